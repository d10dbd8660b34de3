"""`rsa`: layers against layers and against predictors, files and their errors, units, figures."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr
from torch import nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._predictors import read_labels, read_predictors
from dynprobe.analyzers._rsa_ceiling import ceiling_between_runs
from dynprobe.analyzers._rsa_figure import draw_rsa
from dynprobe.analyzers.core.activations import Activations
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.result import Array, Piece, stack
from dynprobe.analyzers.numerics.activations import Layer
from dynprobe.analyzers.numerics.rdm_compare import (
    Comparable,
    ceiling_of_similarities,
    noise_ceiling,
    similarities,
)
from dynprobe.analyzers.rsa import PREDICTOR_RETURNS, rsa

N = 30
COMPARISONS = ("spearman", "rho-a", "pearson", "cosine", "whitened")


def layer(d=5, seed=0, n=N):
    return np.random.default_rng(seed).standard_normal((n, d))


def network(seed=0, noise=0.5):
    """Layers that networks of several seeds share up to noise."""
    return {
        name: layer(d, d) + noise * layer(d, 100 * (seed + 1) + d) for name, d in (("one", 4), ("two", 6))
    }


def classes(n=N, count=3):
    return np.arange(n) % count


def batches(n=N, sizes=(N,)):
    inputs, targets = torch.as_tensor(layer(8, 7, n)), torch.as_tensor(classes(n))
    return list(zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True))


def test_similarity_is_that_of_scipys_rdms_for_every_two_layers():
    a, b = network(0), network(1)
    found = rsa(a, b)
    for i, x in enumerate(a.values()):
        for j, y in enumerate(b.values()):
            expected = spearmanr(pdist(x, "correlation"), pdist(y, "correlation")).statistic
            assert found["similarity"][i, j] == pytest.approx(expected)
    assert found["layer_a"] == ["one", "two"]
    assert found["same_layer"] == 1.0
    assert found["n_samples"] == found["n_conditions"] == N


@pytest.mark.parametrize("compare", COMPARISONS)
def test_a_network_is_one_away_from_nothing_to_itself_and_its_error_is_zero(compare):
    found = rsa(network(), network(), compare=compare, dissimilarity="euclidean")
    np.testing.assert_allclose(np.diagonal(found["similarity"]), 1, rtol=1e-12)
    np.testing.assert_allclose(np.diagonal(found["similarity_stderr"]), 0, atol=1e-12)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_the_error_is_that_of_a_brute_force_jackknife_over_blocks_of_stimuli(compare):
    from dynprobe.analyzers._similarity import stimulus_blocks

    a, b = network(0), network(1)
    block = stimulus_blocks(N, 0, 10)
    found = rsa(a, b, compare=compare, dissimilarity="sqeuclidean")
    left_out = []
    for k in range(10):
        kept = block != k
        x, y = (np.stack([pdist(v[kept], "sqeuclidean") / v.shape[1] for v in n.values()]) for n in (a, b))
        left_out.append(similarities(x, y, compare))
    deleted = np.stack(left_out)
    stderr = np.sqrt(0.9 * ((deleted - deleted.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(found["similarity_stderr"], stderr, rtol=1e-9)
    own = np.diagonal(found["similarity_stderr"])
    np.testing.assert_allclose((found["block_effect"] ** 2).sum(1), own**2, rtol=1e-5)


def test_the_standard_error_is_the_spread_over_samples_drawn_anew():
    draws, errors = [], []
    mixing = layer(6, 5, 4)
    for seed in range(60):
        x = layer(4, 1000 + seed, 50)
        y = x @ mixing + 2.0 * layer(6, 3000 + seed, 50)
        found = rsa(x, y, compare="pearson", dissimilarity="sqeuclidean")
        draws.append(found["similarity"][0, 0])
        errors.append(found["similarity_stderr"][0, 0])
    assert np.mean(errors) == pytest.approx(np.std(draws, ddof=1), rel=0.3)


@pytest.mark.parametrize("measure", ["correlation", "cosine", "euclidean", "sqeuclidean"])
def test_similarity_does_not_change_with_units_permuted_or_layers_rescaled(measure):
    x, y = layer(5), layer(7, 1) + 2
    plain = rsa(x, y, dissimilarity=measure)["similarity"]
    order = np.random.default_rng(1).permutation(7)
    np.testing.assert_allclose(rsa(1e6 * x, 1e-6 * y[:, order], dissimilarity=measure)["similarity"], plain)


def test_distances_ignore_rotation_and_shift_and_correlation_does_not():
    x, y = layer(5), layer(5, 1)
    rotation = np.linalg.qr(layer(5, 2, 5))[0]
    for measure, ignores in (("euclidean", True), ("correlation", False)):
        plain, moved = (
            rsa(x, z, dissimilarity=measure)["similarity"] for z in (y, y @ rotation + layer(5, 3, 1))
        )
        assert np.allclose(plain, moved, rtol=1e-10) == ignores


def test_pairs_in_a_series_are_what_each_pair_is_by_itself_and_record_a_network_once():
    data = batches()
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double())
    held = [as_held(net, data) for net in nets]
    for i in range(3):
        for j in range(3):
            series = rsa(held[i], held[j], dissimilarity="euclidean")
            alone = rsa((nets[i], data), (nets[j], data), dissimilarity="euclidean")
            for name in ("similarity", "similarity_stderr", "block_effect"):
                np.testing.assert_allclose(series[name], alone[name], rtol=1e-12, atol=1e-12)
    assert [one.forwards for one in held] == [1, 1, 1]


def as_held(net, data):
    return Activations(
        "net", f"key {id(net)}", model=lambda: net, batches=lambda: data, input_hash=lambda: "same"
    )


def test_batches_cut_otherwise_change_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh()).double()
    whole, cut = (rsa((net, batches()), (net, batches(sizes=s))) for s in ((N,), (11, 11, 7, 1)))
    np.testing.assert_allclose(whole["similarity"], cut["similarity"], rtol=1e-12)


def test_a_constant_layer_is_nan_and_named_while_the_others_go_on():
    a = {**network(), "dead": np.ones((N, 3))}
    found = rsa(a, network(1))
    assert np.isnan(found["similarity"][2]).all()
    assert np.isfinite(found["similarity"][:2]).all()
    assert any("dead" in note and "constant over the samples" in note for note in found.notes)
    assert found.converged


def test_dead_patterns_are_said_to_have_no_correlation_and_have_distances():
    x = np.abs(layer(6))
    x[4] = 0.0
    found = rsa(x, layer(6, 1))
    assert np.isnan(found["similarity"]).all()
    assert any("1 of 30 patterns" in note and "euclidean is defined" in note for note in found.notes)
    assert np.isfinite(rsa(x, layer(6, 1), dissimilarity="euclidean")["similarity"]).all()


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (np.nan, "it has NaN or infinite in 1 of"),
        (1e160, "largest activation is"),
        (1e-170, "is not a float64"),
    ],
)
def test_activations_that_no_distance_can_be_had_of_are_named_with_the_true_reason(scale, says):
    x = layer()
    x = x * scale if np.isfinite(scale) else np.where(np.arange(x.size).reshape(x.shape) == 7, scale, x)
    net = Activations(
        "net", "key", model=lambda: nn.Identity(), batches=lambda: [(torch.as_tensor(x), torch.zeros(N))]
    )
    net.features = lambda **_: {"fc": Layer(torch.as_tensor(x), None, "")}
    found = rsa(net, layer(), dissimilarity="sqeuclidean")
    assert np.isnan(found["similarity"]).all()
    assert any(says in note for note in found.notes)


def test_a_layer_of_one_feature_has_no_correlation():
    found = rsa(layer(1), layer(4))
    assert any("30 of 30 patterns" in note for note in found.notes)


def test_p_values_come_with_permutations_of_stimuli():
    assert "p_value" not in rsa(layer(), layer(seed=1))
    found = rsa(network(0, 0.1), network(1, 0.1), stimulus_permutations=49)
    assert np.diagonal(found["p_value"]).tolist() == [0.02, 0.02]


def test_no_blocks_no_errors_and_few_stimuli_are_said():
    found = rsa(layer(), layer(seed=1), jackknife_blocks=0)
    assert np.isnan(found["similarity_stderr"]).all()
    assert "block_effect" not in found
    few = rsa(layer(n=4), layer(seed=1, n=4))
    assert any("too few for standard errors" in note for note in few.notes)


def test_conditions_average_their_samples(tmp_path):
    x, y = layer(), layer(seed=1)
    names = np.array(["c", "a", "b", "d", "e"])[np.arange(N) % 5]
    np.save(tmp_path / "labels.npy", names)
    found = rsa(x, y, conditions=str(tmp_path / "labels.npy"))
    means = [np.stack([z[names == c].mean(0) for c in "abcde"]) for z in (x, y)]
    expected = spearmanr(*(pdist(m, "correlation") for m in means)).statistic
    assert found["similarity"][0, 0] == pytest.approx(expected)
    assert found["condition"] == list("abcde")
    assert (found["n_samples"], found["n_conditions"]) == (N, 5)
    (tmp_path / "labels.csv").write_text("label\n" + "\n".join(names))
    again = rsa(x, y, conditions=str(tmp_path / "labels.csv"))
    np.testing.assert_array_equal(again["similarity"], found["similarity"])


def test_conditions_can_be_the_targets():
    found = rsa(layer(), layer(seed=1), batches(), conditions="targets", dissimilarity="crossnobis", folds=3)
    assert found["n_conditions"] == 3
    assert found["condition"] == ["0", "1", "2"]


def test_crossnobis_that_cannot_be_is_nan_and_says_why():
    flat = np.eye(3)[classes()]
    found = rsa(flat, layer(), batches(), conditions="targets", dissimilarity="crossnobis")
    assert np.isnan(found["similarity"]).all()
    assert any("nothing varies within conditions" in note for note in found.notes)


def test_rdms_are_kept_on_request():
    x = layer()
    found = rsa({"fc": x}, {"fc": x}, save_rdms=True, dissimilarity="euclidean")
    np.testing.assert_allclose(found["rdm_a"][0], pdist(x) / np.sqrt(5), rtol=1e-6)
    assert "rdm_a" not in rsa(x, x)


def test_layers_are_compared_with_the_predictors_of_words_and_files(tmp_path):
    features = layer(2, 9)
    np.save(tmp_path / "shape.npy", features)
    a = network()
    found = rsa(
        a, None, batches(), predictors=f"targets, pixels,{tmp_path}/shape.npy", stimulus_permutations=9
    )
    assert found["predictor"] == ["targets", "pixels", "shape[0]", "shape[1]", "shape (all)"]
    rdms = [
        pdist(classes()[:, None], "hamming"),
        pdist(torch.cat([x for x, _ in batches()]).numpy()),
        pdist(features[:, [0]]),
        pdist(features[:, [1]]),
        pdist(features / features.std(0)),
    ]
    for i, values in enumerate(a.values()):
        expected = [spearmanr(pdist(values, "correlation"), rdm).statistic for rdm in rdms]
        np.testing.assert_allclose(found["similarity"][i], expected, rtol=1e-10)
    arrays = declared(found)
    assert arrays["similarity"].dims == ("layer", "predictor")
    assert np.isfinite(found["similarity_stderr"]).all()
    assert np.isnan(found["ceiling_lower"]).all()


def declared(found):
    import dataclasses

    declaration = declaration_of(rsa)
    return labelled(dataclasses.replace(declaration, grain="checkpoint", returns=PREDICTOR_RETURNS), found)


def test_a_stack_of_subjects_has_a_ceiling_and_its_error_is_over_subjects(tmp_path):
    shared = layer(4, 50)
    subjects = np.stack([squareform(pdist(shared + 0.8 * layer(4, 60 + s))) for s in range(5)])
    np.save(tmp_path / "brain.npy", subjects)
    found = rsa(shared, predictors=str(tmp_path / "brain.npy"), dissimilarity="euclidean")
    flat = np.stack([squareform(s, checks=False) for s in subjects])
    each = similarities(pdist(shared)[None], flat, "spearman")[0]
    assert found["similarity"][0, 0] == pytest.approx(each.mean())
    assert found["similarity_stderr"][0, 0] == pytest.approx(each.std(ddof=1) / np.sqrt(5))
    ceiling = noise_ceiling(flat, "spearman")
    assert found["ceiling_lower"][0] == pytest.approx(ceiling.lower.mean())
    assert found["ceiling_lower"][0] < found["ceiling_upper"][0]
    assert found["n_subjects"].tolist() == [5]
    declared(found)


def test_one_flat_subject_of_a_stack_is_named(tmp_path):
    subjects = np.stack([pdist(layer(4, s)) for s in range(4)])
    subjects[2] = 1.0
    found = rsa(layer(), predictors=saved(tmp_path, "brain.npy", subjects))
    assert "predictor brain: no similarity, subject 3 of 4: all dissimilarities are equal" in found.notes


def test_stimuli_that_do_not_activate_a_unit_are_not_listed_among_the_most_activating(tmp_path):
    values = np.zeros((N, 3))
    values[[4, 9], 0] = 1.0, 2.0
    values[:, 1:] = layer(2)
    found = rsa(
        values,
        predictors=saved(tmp_path, "f.npy", values[:, 0]),
        units=True,
        clusters=3,
        inputs_shown=4,
        dissimilarity="euclidean",
    )
    cluster = found["central_unit"][:, 0].tolist().index("activations:0")
    assert found["most_activating"][cluster, 0].tolist() == [9, 4, -1, -1]
    assert found["most_activation"][cluster, 0].tolist() == [2, 1, 0, 0]
    assert found["least_activating"][cluster, 0].tolist() == [-1] * 4
    other = found["central_unit"][:, 0].tolist().index("activations:1")
    order = np.argsort(values[:, 1])
    assert found["least_activating"][other, 0].tolist() == order[:4].tolist()
    np.testing.assert_allclose(found["least_activation"][other, 0], values[order[:4], 1])
    assert np.isnan(found["most_activation"][other, 1]).all()


def test_rdms_are_compared_block_by_block_so_that_few_are_there_at_once(monkeypatch):
    alive, most = [], []
    whole = Comparable.form

    def counted(self, without=None):
        form = whole(self, without)
        alive.append(weakref.ref(form))
        most.append(sum(one() is not None for one in alive))
        return form

    monkeypatch.setattr(Comparable, "form", counted)
    monkeypatch.setattr("dynprobe.analyzers._rsa.REMEMBERED", 0.0)
    rsa(network(0), network(1))
    assert len(most) == 22
    assert max(most) <= 2
    most.clear()
    monkeypatch.setattr("dynprobe.analyzers._rsa.REMEMBERED", 1.0)
    a = Activations("net", "a", model=lambda: nn.Identity(), batches=lambda: batches())
    rsa(a, network(1))
    rsa(a, network(2))
    assert len(most) == 33


def test_units_are_mapped_clustered_and_shown_with_their_inputs(tmp_path):
    features = layer(3, 9)
    np.savetxt(tmp_path / "f.csv", features, delimiter=",", header="hue,size,speed", comments="")
    generator = np.random.default_rng(0)
    units = features[:, np.repeat([0, 1, 2], [8, 6, 4])] + 0.05 * generator.standard_normal((N, 18))
    values = np.concatenate([units, np.full((N, 1), 2.0)], axis=1)
    found = rsa(
        {"fc": values},
        predictors=str(tmp_path / "f.csv"),
        units=True,
        inputs_shown=3,
        dissimilarity="euclidean",
    )
    assert found["unit"][3] == "fc:3"
    expected = spearmanr(pdist(values[:, [3]]), pdist(features[:, [1]])).statistic
    assert found["unit_similarity"][3, 1] == pytest.approx(expected, rel=1e-5)
    assert found["n_clusters"] == 3
    assert found["unit_cluster"][:18].tolist() == [1] * 8 + [2] * 6 + [3] * 4
    assert np.isnan(found["unit_cluster"][18])
    assert any("1 of 19 units are constant" in note for note in found.notes)
    central = int(found["central_unit"][0, 0].split(":")[1])
    order = np.argsort(values[:, central])
    assert found["least_activating"][0, 0].tolist() == order[:3].tolist()
    assert found["most_activating"][0, 0].tolist() == order[::-1][:3].tolist()
    declared(found)


def test_units_of_convolutions_are_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)).double()
    inputs = torch.as_tensor(layer(16)).view(N, 1, 4, 4)
    data = [(inputs, torch.as_tensor(classes()))]
    found = rsa(
        (net, data), None, data, predictors="targets", units=True, clusters=2, dissimilarity="euclidean"
    )
    assert sum(str(u).startswith("0:") for u in found["unit"]) == 5
    assert found.spent["forwards"] == 2
    channel = net[0](inputs).detach().mean((2, 3)).numpy()[:, [2]]
    expected = spearmanr(pdist(channel), pdist(classes()[:, None], "hamming")).statistic
    assert found["unit_similarity"][2, 0] == pytest.approx(expected, rel=1e-5)


def saved(tmp_path, name, array):
    path = tmp_path / name
    if name.endswith(".npz"):
        np.savez(path, **array)
    elif name.endswith(".mat"):
        scipy.io.savemat(path, array)
    elif name.endswith(".csv"):
        path.write_text(array)
    else:
        np.save(path, array)
    return str(path)


def test_predictors_are_read_from_every_format_as_what_their_shape_says(tmp_path):
    rdm = pdist(layer(3, 1, 6))
    square, labels = squareform(rdm), np.array(list("aabbcc"))
    stack_of_two = np.stack([square, 2 * square])

    def names(name, array):
        found = read_predictors(saved(tmp_path, name, array), 6)
        return [p.name for p in found], [p.rdms for p in found]

    for name, array in (("square.npy", square), ("flat.npy", rdm)):
        np.testing.assert_allclose(names(name, array)[1][0][0], rdm)
    np.testing.assert_allclose(names("stack.npy", stack_of_two)[1][0], [rdm, 2 * rdm])
    np.testing.assert_allclose(names("flats.npy", np.stack([rdm, 2 * rdm]))[1][0], [rdm, 2 * rdm])
    same = (labels[:, None] != labels).astype(float)
    np.testing.assert_array_equal(squareform(names("words.npy", labels)[1][0][0]), same)
    assert names("two.npz", {"shape": square, "speed": np.arange(6.0)})[0] == ["shape", "speed"]
    mat = {"brain": np.moveaxis(stack_of_two, 0, 2), "speed": np.arange(6.0), "kind": list(labels)}
    found, arrays = names("m.mat", mat)
    assert found == ["brain", "speed", "kind"]
    np.testing.assert_allclose(arrays[0], [rdm, 2 * rdm])
    np.testing.assert_array_equal(squareform(arrays[2][0]), same)
    text = "hue,kind,size\n" + "\n".join(f"{i},{labels[i]},{i * i}" for i in range(6))
    found, arrays = names("t.csv", text)
    assert found == ["hue", "size", "t (all)", "kind"]
    np.testing.assert_array_equal(squareform(arrays[3][0]), same)
    assert names("plain.csv", "\n".join(f"{i},{i * i}" for i in range(6)))[0] == [
        "plain[0]",
        "plain[1]",
        "plain (all)",
    ]
    np.testing.assert_allclose(
        names("square.csv", "\n".join(",".join(map(repr, map(float, row))) for row in square))[1][0][0], rdm
    )


def in_every_format(tmp_path, name, values):
    """A column of numbers as each kind of file holds it."""
    lines = "\n".join(f"{v:g}" for v in values)
    return [
        saved(tmp_path, f"{name}.npy", np.array(values, dtype=np.int64)),
        saved(tmp_path, f"{name}.npz", {name: np.array(values, dtype=float)}),
        saved(tmp_path, f"{name}.mat", {name: np.array(values, dtype=float)}),
        saved(tmp_path, f"{name}.csv", f"{name}\n{lines}"),
    ]


def test_whole_numbers_are_numbers_in_every_format_and_classes_where_they_are_named(tmp_path):
    codes = [5, 5, 1, 1, 2, 2]
    for path in in_every_format(tmp_path, "lab", codes):
        (number,) = read_predictors(path, 6)
        np.testing.assert_array_equal(number.rdms[0], pdist(np.array(codes, dtype=float)[:, None]))
        assert "|x_i - x_j|" in number.kind
        assert "--classes" in number.kind
        (label,) = read_predictors(path, 6, {"lab"})
        np.testing.assert_array_equal(label.rdms[0], pdist(np.array(codes)[:, None], "hamming"))
        assert label.kind == "classes (3)"


def test_how_each_predictor_was_read_is_said(tmp_path):
    text = "rating,lab,kind\n" + "\n".join(f"{i / 7},{i % 3},{'ab'[i % 2]}" for i in range(N))
    path = saved(tmp_path, "t.csv", text)
    notes = rsa(layer(), predictors=path, classes="lab").notes
    assert "rating: |x_i - x_j|" in notes
    assert "lab: classes (3)" in notes
    assert "kind: classes (2)" in notes
    rdm = saved(tmp_path, "human.npy", np.stack([squareform(pdist(layer(2, s))) for s in (1, 2)]))
    assert "human: RDMs of 2 subjects" in rsa(layer(), predictors=rdm).notes
    for given, says in (("lap", "no predictor is called so"), ("human", "no list of labels")):
        with pytest.raises(OptionError, match=says):
            rsa(layer(), predictors=rdm, classes=given)


def test_a_first_row_of_numbers_is_a_row_of_numbers_unless_it_counts_the_columns(tmp_path):
    rows = [f"{0.3 + i},{i * i}" for i in range(7)]
    with pytest.raises(OptionError, match=r"shape \(7, 2\)"):
        read_predictors(saved(tmp_path, "a.csv", "\n".join(rows)), 6)
    counted = read_predictors(saved(tmp_path, "b.csv", "\n".join(["0,1", *rows[:6]])), 6)
    assert [p.name for p in counted] == ["0", "1", "b (all)"]
    with pytest.raises(OptionError, match="7 labels, and 6 samples"):
        read_labels(saved(tmp_path, "c.csv", "1\n2\n1\n2\n1\n2\n1"), 6)
    with pytest.raises(OptionError, match="fits 6 stimuli neither"):
        read_predictors(saved(tmp_path, "d.csv", "\n".join("aabbcca")), 6)


def test_row_names_of_pandas_are_left_out_and_that_is_said(tmp_path):
    square = squareform(pdist(layer(3, 1, 6)))
    head = ",x,y\n" + "\n".join(f"{i},{i * i},{i / 7}" for i in range(6))
    found = read_predictors(saved(tmp_path, "a.csv", head), 6)
    assert [p.name for p in found] == ["x", "y", "a (all)"]
    assert all("unnamed first column" in p.kind for p in found)
    names = [f"s{i}" for i in range(6)]
    lines = [",".join([n, *map(repr, map(float, row))]) for n, row in zip(names, square, strict=True)]
    for text in ([",".join(["", *names]), *lines], [",".join(names), *(x.split(",", 1)[1] for x in lines)]):
        (rdm,) = read_predictors(saved(tmp_path, "b.csv", "\n".join(text)), 6)
        np.testing.assert_allclose(squareform(rdm.rdms[0]), square)


def test_a_sparse_matrix_is_read_and_cells_of_numbers_are_refused(tmp_path):
    square = squareform(pdist(layer(3, 1, 6)))
    path = saved(tmp_path, "a.mat", {"R": scipy.sparse.csc_matrix(square)})
    np.testing.assert_allclose(squareform(read_predictors(path, 6)[0].rdms[0]), square)
    cells = np.empty(2, dtype=object)
    cells[:] = [square, square]
    with pytest.raises(OptionError, match="'c': a cell array"):
        read_predictors(saved(tmp_path, "b.mat", {"c": cells}), 6)


def test_as_many_condensed_rdms_as_stimuli_are_refused_and_square_ones_are_not(tmp_path):
    rdms = np.stack([pdist(layer(3, s, 6)) for s in range(6)])
    with pytest.raises(OptionError, match=r"6 RDMs, or a table of 15 features") as error:
        read_predictors(saved(tmp_path, "a.npy", rdms), 6)
    assert "(6, 6, 6)" in error.value.tip
    square = np.stack([squareform(rdm) for rdm in rdms])
    (found,) = read_predictors(saved(tmp_path, "b.npy", square), 6)
    np.testing.assert_allclose(found.rdms, rdms)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("a.csv", 'hue\n1\n""\n3\n4\n5\n6', "column 'hue': row 3 is empty"),
        ("a.csv", "hue\n1\n2\n3\nx\n5\n6", "column 'hue': row 5 is 'x', among numbers"),
        ("a.csv", "kind\na\na\nb\n7\nb\nb", "column 'kind': row 5 is '7', among text"),
        ("a.csv", "1;2\n3;4\n5;6\n7;8\n9;0\n1;1", "separated by semicolons"),
        ("a.npy", np.ones((6, 6)), "zeros on its diagonal"),
        ("a.npy", np.triu(np.ones((6, 6)), 1), "not symmetric"),
        ("a.npy", np.ones((7, 2)), r"shape \(7, 2\) fits 6 stimuli neither"),
        ("a.npy", np.array([1.0, np.nan, 2, 3, 4, 5]), "1 of 6 values are NaN"),
        ("a.npy", np.array([str(i) for i in range(6)]), "all 6 labels differ"),
        ("a.npy", np.array(list("aabb")), "fits 6 stimuli neither"),
        ("a.npy", np.ones(6, dtype=complex), "no numbers"),
        ("a.csv", "1,2\n3\n", "row 2 has 1 entries"),
        ("a.csv", "x,x\n1,2\n1,2\n1,2\n1,2\n1,2\n1,2\n", "one name"),
        ("a.csv", "x,y\n1,2\n1,2\n", "fits 6 stimuli neither"),
        ("a.csv", "", "no array"),
    ],
)
def test_a_predictor_that_fits_no_way_is_refused_with_its_file_and_shape(tmp_path, name, array, says):
    with pytest.raises(OptionError, match=says) as error:
        read_predictors(saved(tmp_path, name, array), 6)
    assert str(tmp_path / name) in error.value.message
    assert error.value.tip


def test_files_that_cannot_be_read_are_refused_and_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    (tmp_path / "b.mat").write_bytes(b"MATLAB 7.3 MAT-file" + b" " * 105 + b"\x00\x02IM" + b"\0" * 64)
    for name, says in (
        ("o.npy", "cannot be read"),
        ("no.npy", "no such file"),
        ("a.txt", "not read"),
        ("b.mat", "HDF|cannot"),
    ):
        with pytest.raises(OptionError, match=says):
            read_predictors(str(tmp_path / name), 6)


def test_labels_that_do_not_fit_are_refused(tmp_path):
    cases = [
        ("a.npy", np.arange(5), "5 labels, and 6 samples"),
        ("b.npy", np.ones((6, 2)), "no labels"),
        ("c.npy", np.arange(6) / 2, "no labels"),
        ("d.npz", {"a": np.arange(6), "b": np.arange(6)}, "2 arrays"),
    ]
    for name, array, says in cases:
        with pytest.raises(OptionError, match=says):
            read_labels(saved(tmp_path, name, array), 6)
    label, names = read_labels(saved(tmp_path, "e.csv", "10\n9\n10\n9\n3\n3"), 6)
    assert names == ["3", "9", "10"]
    assert label.tolist() == [2, 1, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dissimilarity": "crossnobis"}, "needs repeats"),
        ({"folds": 3}, "folds has no effect without --dissimilarity crossnobis"),
        ({"noise": "identity"}, "noise has no effect"),
        ({"units": True}, "units has no effect without --predictors"),
        ({"clusters": 3}, "clusters has no effect without --units"),
        ({"inputs_shown": 3}, "inputs-shown has no effect"),
        ({"jackknife_blocks": 1}, "jackknife-blocks 1"),
        ({"conditions": "targets"}, "saved activations come without"),
        ({"predictors": "pixels"}, "saved activations come without"),
        ({"predictors": " , "}, "names nothing"),
        ({"memory": 1e-6}, "for 1 layers take"),
        ({"classes": "lab"}, "classes has no effect without --predictors"),
        ({"predictors": "targets", "level": 0.5}, "level has no effect with --predictors"),
        ({"predictors": "targets", "bootstrap": 9}, "bootstrap has no effect"),
        ({"predictors": "targets", "permutations": 9}, "permutations has no effect"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_compute(options, says):
    with pytest.raises(OptionError, match=says) as error:
        rsa(layer(), layer(seed=1), **options)
    assert error.value.tip


def test_data_that_do_not_fit_the_options_are_refused(tmp_path):
    x, real = layer(), [(torch.ones(N, 2), torch.rand(N))]
    tokens = [(torch.ones(N, 2, dtype=torch.int64), torch.as_tensor(classes()))]
    one = [(torch.ones(N, 2), torch.zeros(N, dtype=torch.int64))]
    few = saved(tmp_path, "few.npy", np.array([0, 1, 2] + [0] * (N - 3)))
    mixed = saved(tmp_path, "mixed.npy", np.arange(N) % 4)
    same = saved(tmp_path, "same.npy", classes())
    cases = [
        (real, {"conditions": "targets"}, "no classes"),
        (tokens, {"predictors": "pixels"}, "tokens"),
        (one, {"conditions": "targets"}, "needs 3"),
        (batches(), {"conditions": mixed, "predictors": "targets"}, "several classes"),
        (batches(), {"conditions": same, "predictors": "targets"}, "class of its own"),
        (batches(), {"predictors": "targets,targets"}, "two predictors are called"),
    ]
    for data, options, says in cases:
        with pytest.raises(OptionError, match=says):
            rsa(x, None, data, **options)
    with pytest.raises(OptionError, match="condition 1 has 1 samples"):
        rsa(x, x, conditions=few, dissimilarity="crossnobis")
    pairs = saved(tmp_path, "pairs.npy", np.arange(N) // 2)
    with pytest.raises(OptionError, match="every fold has one sample of each condition"):
        rsa(x, x, conditions=pairs, dissimilarity="crossnobis")
    assert np.isfinite(
        rsa(x, x, conditions=pairs, dissimilarity="crossnobis", noise="identity")["similarity"]
    )
    table = saved(tmp_path, "wide.npy", layer(50))
    with pytest.raises(OptionError, match="for 51 predictors take"):
        rsa(x, predictors=table, memory=1e-4)
    with pytest.raises(OptionError, match="something to compare it with"):
        rsa(x)
    with pytest.raises(OptionError, match="fewer than 3"):
        rsa(x[:2], x[:2])
    with pytest.raises(OptionError, match="same inputs"):
        rsa(x, x[:20])


def piece_of(found, returns, **index):
    arrays = {n: Array(returns[n].dims, as_array(v)) for n, v in found.items()}
    return Piece(str(index), index, arrays)


def as_array(value):
    array = np.asarray(value)
    return array.astype(object) if array.dtype.kind in "US" else array


def between_runs(**options):
    returns = declaration_of(rsa).returns
    pieces = []
    for i in range(4):
        for j in range(i + 1, 4):
            found = rsa(network(i), network(j), **options)
            labels = {"run_a": f"r{i}", "step_a": 9, "run_b": f"r{j}", "step_b": 9}
            pieces.append(piece_of(found, returns, **labels))
    return stack("rsa", "pair", pieces, {"options": {"bootstrap": 50, "permutations": 50}})


def test_the_ceiling_between_runs_is_that_of_their_rdms():
    found = ceiling_between_runs(between_runs(compare="pearson"))
    rdms = np.stack([pdist(network(i)["two"], "correlation") for i in range(4)])
    ceiling = noise_ceiling(rdms, "pearson")
    assert found["ceiling_layer"].tolist() == ["one", "two"]
    assert found["network_ceiling_lower"][1] == pytest.approx(ceiling.lower.mean())
    assert found["network_ceiling_upper"][1] == pytest.approx(ceiling.upper.mean())
    assert (found["network_ceiling_lower_stderr"] > 0).all()
    assert found["ceiling_networks"] == 4


def test_the_ceiling_between_runs_of_rho_a_knows_that_ties_are_below_one(monkeypatch):
    tied = {i: {"one": np.round(network(i)["one"])[:, :1]} for i in range(4)}
    monkeypatch.setitem(globals(), "network", lambda i: tied[i])
    result = between_runs(compare="rho-a", dissimilarity="euclidean")
    found = ceiling_between_runs(result)
    s = similarities(*2 * [np.stack([pdist(tied[i]["one"]) for i in range(4)])], "rho-a")
    assert np.diagonal(s).max() < 0.99
    assert found["network_ceiling_upper"][0] == pytest.approx(ceiling_of_similarities(s).upper.mean())
    assert found["network_ceiling_lower"][0] == pytest.approx(ceiling_of_similarities(s).lower.mean())
    assert (found["network_ceiling_lower_stderr"] > 0).all()


def several_runs(tmp_path, columns=2):
    """Two runs of different architectures against many predictors, a stack the last of them."""
    stacked = np.stack([pdist(layer(3, s)) for s in range(3)])
    files = [saved(tmp_path, "f.npy", layer(columns, 9)), saved(tmp_path, "human.npy", stacked)]
    nets = {"narrow": {f"n{i}": layer(4, i) for i in range(10)}, "wide": {"w0": layer(5), "w1": layer(6)}}
    pieces = [
        piece_of(rsa(net, predictors=",".join(files), save_rdms=True), PREDICTOR_RETURNS, run=run, step=step)
        for run, net in nets.items()
        for step in (0, 10)
    ]
    return stack("rsa", "checkpoint", pieces, {})


def texts_of(figure):
    return [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))]


def drawn(result, style):
    figure = Figure(layout="constrained")
    draw_rsa(result, figure, style)
    figure.canvas.draw()
    return figure


def test_the_rdms_of_every_run_are_drawn_under_its_name_with_its_own_layers_evenly_spread(tmp_path):
    figure = drawn(several_runs(tmp_path), "rdms")
    texts = texts_of(figure)
    assert {"narrow\nstep 10", "wide\nstep 10"} <= set(texts)
    titles = [a.get_title() for a in figure.axes]
    assert titles[:10] == ["n0", "n1", "n3", "n4", "n5", "n6", "n8", "n9", "w0", "w1"]
    assert "8 of 10 layers shown" in texts


def test_each_run_has_its_own_layers_along_the_axis_of_depth(tmp_path):
    figure = drawn(several_runs(tmp_path), "depth")
    names = [[t.get_text() for t in a.get_xticklabels()] for a in figure.axes]
    assert names == [[f"n{i}" for i in range(10)], ["w0", "w1"]]


def test_stacks_and_whole_tables_are_drawn_first_and_what_is_left_out_is_said(tmp_path):
    result = several_runs(tmp_path, columns=9)
    for style in ("steps", "depth"):
        texts = texts_of(drawn(result, style))
        assert "6 of 11 predictors shown" in texts
        assert any("f (all)" in text for text in texts)
        assert any("human" in text for text in texts)
        assert "noise ceiling" in texts


def test_saved_activations_have_no_step_in_their_title(tmp_path):
    found = rsa(network(0), network(1), save_rdms=True)
    labels = {"run_a": "a.npy", "step_a": np.nan, "run_b": "b.npy", "step_b": np.nan}
    result = stack("rsa", "pair", [piece_of(found, declaration_of(rsa).returns, **labels)], {})
    texts = texts_of(drawn(result, "rdms"))
    assert {"a.npy", "b.npy"} <= set(texts)
    assert not any("step" in text for text in texts)


def test_options_that_decide_no_number_are_marked_so():
    settings = {option.name for option in declaration_of(rsa).options if option.is_setting}
    assert settings == {"memory", "permutations", "bootstrap", "level"}


def test_every_style_draws_and_others_are_refused(tmp_path):
    pairs = between_runs(save_rdms=True)
    saved(tmp_path, "f.npy", layer(3, 9))
    pieces = [
        piece_of(
            rsa(network(i), predictors=f"{tmp_path}/f.npy", units=True, save_rdms=True),
            PREDICTOR_RETURNS,
            run="r",
            step=10 * i,
        )
        for i in range(3)
    ]
    predicted = stack("rsa", "checkpoint", pieces, {})
    for result, styles in (
        (pairs, ("", "heatmap", "rdms")),
        (predicted, ("", "steps", "depth", "units", "rdms")),
    ):
        for style in styles:
            figure = Figure(layout="constrained")
            draw_rsa(result, figure, style)
            assert figure.axes, style
            figure.canvas.draw()
        with pytest.raises(OptionError, match="not a style"):
            draw_rsa(result, Figure(), "pie")
    plain = stack(
        "rsa",
        "checkpoint",
        [piece_of(rsa(network(), predictors=f"{tmp_path}/f.npy"), PREDICTOR_RETURNS, run="r", step=0)],
        {},
    )
    draw_rsa(plain, Figure(layout="constrained"))
    for style, says in (("units", "no single units"), ("rdms", "no RDMs")):
        with pytest.raises(OptionError, match=says):
            draw_rsa(plain, Figure(), style)
