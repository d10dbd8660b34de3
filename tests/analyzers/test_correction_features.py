"""The table of features, the feature file, and which samples are judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._corrections_feature_names import input_names
from dynprobe.analyzers._corrections_features import read_features
from dynprobe.analyzers._corrections_samples import choose_samples, class_labels

NAMES = ("interest", "ltv", "mean_radius", "mean_area", "worst_area", "house", "flat", "land")


class Data(list):
    """Batches with names and units."""

    def __init__(self, values, names=NAMES, offset=None, scale=None, sizes=(3, 5, 4), dtype=torch.float64):
        inputs = (values - (0 if offset is None else offset)) / (1 if scale is None else scale)
        parts = torch.as_tensor(inputs).to(dtype).split([*sizes])
        super().__init__((part, torch.zeros(len(part))) for part in parts)
        self.feature_names, self.feature_offset, self.feature_scale = names, offset, scale


def values_of(n=12, seed=0):
    """Five real features in units of their own, and a category in three columns."""
    generator = np.random.default_rng(seed)
    numbers = generator.uniform([0, 60, 5, 100, 200], [10, 120, 30, 2500, 4000], (n, 5)).round(2)
    return np.column_stack([numbers, np.eye(3)[np.arange(n) % 3]])


@pytest.fixture
def values():
    return values_of()


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "features.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


HOME = """
[[one_hot]]
name = "property"
features = ["house", "flat", "land"]
"""


# Names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ltv,interest", ["ltv", "interest"]),
        ("LTV, Mean Radius", ["ltv", "mean_radius"]),
        ("mean-radius", ["mean_radius"]),
        ("mean_*", ["mean_radius", "mean_area"]),
        ("*_AREA", ["mean_area", "worst_area"]),
        ("0,3", ["interest", "mean_area"]),
        ("1:3,0", ["ltv", "mean_radius", "interest"]),
        (":5:2", ["interest", "mean_radius", "worst_area"]),
        ("-4", ["worst_area"]),
        ("ltv,ltv,*", ["ltv", "interest", "mean_radius", "mean_area", "worst_area", "house", "flat", "land"]),
        ("all", list(NAMES)),
    ],
)
def test_features_are_chosen_by_name_number_range_and_pattern_in_the_order_typed(values, text, names):
    table = read_features(Data(values), features=text)
    assert list(table.names) == names
    assert [NAMES[i] for i in table.index] == names


def test_a_name_that_is_a_number_goes_before_the_number(values):
    table = read_features(Data(values[:, :3], names=("2", "1", "0:2")), features="2,0:2")
    assert table.index.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "message", "tip"),
    [
        ("intrest", "no feature is called 'intrest'", "Did you mean 'interest'?"),
        ("zzz", "no feature is called 'zzz'", "There are 8 features, numbered from 0: interest, ltv"),
        ("max_*", "no feature matches 'max_*'", "interest"),
        ("8", "there is no feature 8", "There are 8 features"),
        ("9:12", "'9:12' holds no feature", "There are 8 features"),
        ("::0", "'::0' holds no feature", "There are 8 features"),
        (" , ", "none is chosen", "all"),
    ],
)
def test_an_unknown_feature_is_refused_with_the_names_there_are(values, text, message, tip):
    with pytest.raises(OptionError) as error:
        read_features(Data(values), features=text)
    assert message in error.value.message
    assert tip in error.value.tip


def test_a_name_that_may_be_two_features_is_refused(values):
    with pytest.raises(OptionError, match=r"'meanradius' may be 2 features: 'mean_radius' \(0\)"):
        read_features(Data(values[:, :2], names=("mean_radius", "Mean Radius")), features="meanradius")


def test_features_without_names_are_called_by_their_place(values):
    assert input_names((3,)) == ("x0", "x1", "x2")
    assert input_names((1, 2, 2)) == ("pixel_0_0", "pixel_0_1", "pixel_1_0", "pixel_1_1")
    assert input_names((2, 1, 2)) == ("pixel_0_0_0", "pixel_0_0_1", "pixel_1_0_0", "pixel_1_0_1")
    assert input_names((2, 2)) == ("x0_0", "x0_1", "x1_0", "x1_1")
    image = Data(np.arange(12 * 4.0).reshape(12, 1, 2, 2), names=())
    table = read_features(image, features="pixel_1_*,pixel_0_1")
    assert table.index.tolist() == [2, 3, 1]


def test_a_single_tensor_in_a_tuple_or_dictionary_is_read(values):
    for wrap in (lambda x: (x,), lambda x: {"x": x}):
        table = read_features([(wrap(torch.tensor(values)), None)], features="x1")
        assert table.high[0] == values[:, 1].max()


@pytest.mark.parametrize(
    "inputs", [torch.zeros(4, 2, dtype=torch.int64), (torch.zeros(4, 2), torch.zeros(4, 2))]
)
def test_inputs_that_are_not_one_tensor_of_real_numbers_are_refused(inputs):
    with pytest.raises(OptionError, match=r"must be one tensor \(n_samples, …\) of real numbers.*\(4, 2\)"):
        read_features([(inputs, None)])


# Ranges, costs and stability


def test_ranges_are_minimum_and_maximum_of_the_data_and_the_cost_is_one_over_the_range(values):
    table = read_features(Data(values), features="interest,ltv")
    np.testing.assert_array_equal(table.low, values[:, :2].min(0))
    np.testing.assert_array_equal(table.high, values[:, :2].max(0))
    np.testing.assert_allclose(table.weight * (table.high - table.low), 1, rtol=1e-15)
    np.testing.assert_allclose(table.stability, 0.025 * (table.high - table.low), rtol=1e-15)


@pytest.mark.parametrize("sizes", [(12,), (1, 11), (5, 5, 2)])
def test_the_split_into_batches_changes_nothing(values, sizes):
    one, other = (read_features(Data(values, sizes=s), ranges="10%:80%") for s in (sizes, (3, 5, 4)))
    np.testing.assert_array_equal(one.low, other.low)
    np.testing.assert_array_equal(one.high, other.high)


def test_ranges_are_quantiles_in_per_cent_and_values_without(values):
    table = read_features(
        Data(values), features="interest,ltv,mean_area", ranges="10%:0.9e2,ltv=60:75%,3=0:9"
    )
    np.testing.assert_allclose(table.low, [np.quantile(values[:, 0], 0.1), 60, 0])
    np.testing.assert_allclose(table.high, [90, np.quantile(values[:, 1], 0.75), 9])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10:0", "the range '10:0' has no inside"),
        ("99%:1%", "the range '99%:1%' has no inside"),
        ("5", "'5' is no range"),
        ("0:a", "'a' is no number"),
        ("0:nan", "'nan' cannot be used"),
        ("0%:101%", "'101%' cannot be used"),
        ("ltv=1e9:100%", "'ltv' ends at"),
        ("0:1,0:2", "2 values for all features"),
        ("rate=0:1", "no feature is called 'rate'"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(values, text, message):
    with pytest.raises(OptionError) as error:
        read_features(Data(values), features="interest,ltv", ranges=text)
    assert message in error.value.message
    assert "ranges" in error.value.message
    assert error.value.tip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", [0, 0, 0]),
        ("0.5", [0.5, 0.5, 0.5]),
        ("10%", [0.1 * 100, 0.1 * 10, 0.1 * 1]),
        ("interest=0.5,ltv=5%", [0.5, 0.5, 0]),
        ("10%,interest=0.5", [0.5, 1, 0.1]),
        ("*=1,mean_*=0.25,ltv=3", None),
        ("l*=2,ltv=3", [0, 3, 0]),
        ("", [0, 0, 0]),
    ],
)
def test_stability_is_for_all_or_by_name_and_features_without_one_have_none(values, text, expected):
    data = Data(values)
    given = {"features": "interest,ltv,mean_area", "ranges": "0:100,ltv=0:10,mean_area=0:1"}
    if expected is None:
        with pytest.raises(OptionError, match=r"mean_\*=0.25 and stability \*=1 give 'mean_radius' another"):
            read_features(data, **given, stability=text)
    else:
        np.testing.assert_allclose(read_features(data, **given, stability=text).stability, expected)


def test_a_negative_stability_is_refused(values):
    with pytest.raises(OptionError, match="stability: '-1' is negative"):
        read_features(Data(values), features="ltv", stability="ltv=-1")


def test_constant_features_are_left_out_of_a_pattern_and_refused_by_name(values):
    values[:, 1] = 3.3
    table = read_features(Data(values), features="0:3")
    assert table.names == ("interest", "mean_radius")
    assert table.notes == ("left out, as they do not vary in the data: ltv",)
    with pytest.raises(OptionError, match="'ltv' has one value only") as error:
        read_features(Data(values), features="interest,ltv")
    assert "--ranges ltv=LOW:HIGH" in error.value.tip
    assert read_features(Data(values), features="ltv", ranges="ltv=0:9").high == [9]
    values[:] = 1
    with pytest.raises(OptionError, match="none of them varies"):
        read_features(Data(values))


def test_features_with_missing_values_are_refused_by_name(values):
    values[4, 1] = np.nan
    with pytest.raises(OptionError, match="'ltv' is NaN or infinite"):
        read_features(Data(values))


# Units


def test_everything_is_in_the_datas_own_units_whatever_the_inputs_are(values):
    offset, scale = values.mean(0), values.std(0)
    plain = read_features(Data(values), features="0:5", stability="1,ltv=2%")
    table = read_features(Data(values, offset=offset, scale=scale), features="0:5", stability="1,ltv=2%")
    for name in ("low", "high", "weight", "stability"):
        np.testing.assert_allclose(getattr(table, name), getattr(plain, name), rtol=1e-12)
    inputs = (values - offset) / scale
    np.testing.assert_allclose(table.shown(inputs[:, table.index]), values[:, :5], rtol=1e-12)
    np.testing.assert_allclose(table.inputs(values[:, :5]), inputs[:, :5], rtol=1e-12, atol=1e-14)


def test_a_judged_float32_input_is_within_the_range_of_its_data(values):
    data = Data(values, offset=values.mean(0), scale=values.std(0), dtype=torch.float32)
    table = read_features(data, features="0:5")
    shown = table.shown(torch.cat([inputs for inputs, _ in data]).double().numpy()[:, table.index])
    assert (shown >= table.low).all()
    assert (shown <= table.high).all()


# The file


def test_a_feature_file_gives_range_cost_stability_direction_and_unit(values, write):
    path = write(
        """
        [features.interest]
        range = [0, 20]
        weight = 0.1
        stability = "5%"
        direction = "down"
        unit = "%"
        [features."Mean Radius"]
        range = "25%:75%"
        stability = 0.5
        direction = "up"
        """
    )
    table = read_features(Data(values), features="interest,mean_radius,ltv", feature_file=path)
    assert table.low[:2].tolist() == [0, np.quantile(values[:, 2], 0.25)]
    assert table.high[:2].tolist() == [20, np.quantile(values[:, 2], 0.75)]
    assert table.weight[0] == 0.1
    np.testing.assert_allclose(table.stability, [1, 0.5, 0.025 * np.ptp(values[:, 1])])
    assert table.direction.tolist() == [-1, 1, 0]
    assert table.unit == ("%", "", "")


def test_a_name_on_the_command_line_goes_before_the_file_and_that_before_what_is_said_of_all(values, write):
    path = write('[features."mean_*"]\nstability = 3\n[features.mean_area]\nstability = 4\n')
    given = {"features": "interest,mean_*,worst_area", "feature_file": path}
    table = read_features(Data(values), **given, stability="1")
    assert table.stability.tolist() == [1, 3, 4, 1]
    table = read_features(Data(values), **given, stability="1,mean_area=9")
    assert table.stability.tolist() == [1, 3, 9, 1]


def test_the_files_units_go_before_the_datas(values, write):
    path = write("[features.ltv]\nmean = 2\nstd = 10\n[features.interest]\nscale = 5\n")
    data = Data(values, offset=np.full(8, 1.0), scale=np.full(8, 4.0))
    table = read_features(data, features="0:3", feature_file=path)
    assert table.offset.tolist() == [0, 2, 1]
    assert table.scale.tolist() == [5, 10, 4]
    np.testing.assert_allclose(table.low[1], 2 + 10 * (values[:, 1].min() - 1) / 4)


def test_integer_features_have_whole_ranges_and_a_whole_stability(values, write):
    values[:, 1] = np.arange(12) + 20
    path = write("[features.ltv]\ninteger = true\nrange = [19.5, 35.5]\nstability = 2.7\n")
    mean, std = np.full(8, 25.3), np.full(8, 3.7)
    data = Data(values, offset=mean, scale=std, dtype=torch.float32)
    table = read_features(data, features="ltv", feature_file=path)
    assert (table.low, table.high, table.stability) == ([20], [35], [2])
    assert table.integer.tolist() == [True]
    np.testing.assert_array_equal(
        table.shown(torch.cat([x for x, _ in data]).numpy()[:, [1]])[:, 0], values[:, 1]
    )
    table = read_features(data, features="ltv", feature_file=path, stability="ltv=0.5")
    assert table.stability == [0]
    assert table.notes == ("ltv takes whole numbers: a stability of 0.5 is none",)
    exact = read_features(data, features="ltv", feature_file=path, ranges="ltv=0:40", stability="ltv=2.5%")
    assert exact.stability == [1]


def test_a_feature_said_to_be_integer_that_is_not_is_refused(values, write):
    with pytest.raises(OptionError, match="'ltv' is said to take whole numbers, and a sample has"):
        read_features(Data(values), features="ltv", feature_file=write("[features.ltv]\ninteger = true\n"))


def test_immutable_features_are_left_out_of_a_pattern_and_refused_by_name(values, write):
    path = write('[features."mean_*"]\nimmutable = true\n' + HOME + "immutable = true\n")
    table = read_features(Data(values), feature_file=path)
    assert table.names == ("interest", "ltv", "worst_area")
    assert not table.groups
    assert table.notes == ("left out, immutable: mean_radius, mean_area, property",)
    for name in ("mean_area", "property"):
        with pytest.raises(OptionError, match=f"'{name}' is immutable in the feature file"):
            read_features(Data(values), features=f"ltv,{name}", feature_file=path)
    with pytest.raises(OptionError, match="all are immutable: mean_radius, mean_area"):
        read_features(Data(values), features="mean_*", feature_file=path)


BAD_FILES = [
    ("[features.ltv]\nweigth = 1\n", "[features.ltv]: 'weigth' is not known", "Did you mean 'weight'?"),
    ("[feature.ltv]\n", "'feature' is not known", "Did you mean 'features'?"),
    ("[features.rate]\nweight = 1\n", "[features.rate]: no feature is called 'rate'", "interest"),
    ("[features.ltv]\nweight = 0\n", "[features.ltv] weight: 0 must be above 0", "immutable = true"),
    ("[features.ltv]\nweight = '1'\n", "weight: '1' is no number", "without quotes"),
    ("[features.ltv]\nscale = true\n", "scale: True is no number", "without quotes"),
    ("[features.ltv]\noffset = nan\n", "offset: nan cannot be used", "finite"),
    ("[features.ltv]\nrange = [3, 3]\n", "range: the range [3, 3] has no inside", "lower end first"),
    ("[features.ltv]\nrange = 3\n", "range: 3 is no range", "LOW:HIGH"),
    ("[features.ltv]\nstability = -1\n", "stability: -1 is negative", "2.5%"),
    ("[features.ltv]\nstability = [1]\n", "stability: [1] is no number", "2.5%"),
    ("[features.ltv]\ninteger = 1\n", "integer: 1 is neither true nor false", "quotes"),
    ("[features.ltv]\ndirection = 'left'\n", "direction: 'left' is no direction", "down"),
    ("[features.ltv]\nunit = 3\n", "unit: 3 is no text", "quotes"),
    ("[features.ltv]\nmean = 1\noffset = 1\n", "mean and offset say the same", "Keep"),
    ("[features.ltv]\nscale = 1\nstd = 1\n", "std and scale say the same", "Keep std or scale"),
    ("[features.ltv]\nimmutable = true\ndirection = 'up'\n", "immutable has no direction", "Keep"),
    (
        "[features.ltv]\nweight = 1\n[features.1]\nweight = 2\n",
        "[features.1] and FILE: [features.ltv] give 'ltv' another weight",
        "Keep one",
    ),
    ("features = 3\n", "one section for each feature", "[features."),
    ("[features.mean radius]\n", "it is no TOML", "needs quotes"),
    ("[one_hot]\nname = 'a'\n", "double brackets", "[[one_hot]]"),
    ("[[one_hot]]\nfeatures = ['house', 'flat']\n", "[[one_hot]] name: '' is no text", "quotes"),
    ("[[one_hot]]\nname = 'p'\nfeatures = 'house'\n", "'p': features needs a list", "features = ["),
    ("[[one_hot]]\nname = 'p'\nfeatures = ['house']\n", "at least two categories", "baseline = true"),
    ("[[one_hot]]\nname = 'p'\nfeatures = ['house', 5]\n", "each one once", "baseline"),
    ("[[one_hot]]\nname = 'p'\nfeatures = ['house', 'hut']\n", "'p': no feature is called 'hut'", "house"),
    ("[[one_hot]]\nname = 'LTV'\nfeatures = ['house', 'flat']\n", "another feature has that name", "its own"),
    (
        HOME + "[[one_hot]]\nname = 'q'\nfeatures = ['land', 'ltv']\n",
        "'land' is a category of 'property' and of 'q'",
        "Keep it in one",
    ),
    (
        HOME + "[features.flat]\nweight = 3\n",
        "weight means nothing for a category of 'property'",
        "Remove it",
    ),
    (
        HOME + "[features.flat]\nimmutable = true\n",
        "'flat' is immutable and others are not",
        "immutable = true",
    ),
]


@pytest.mark.parametrize(("text", "message", "tip"), BAD_FILES, ids=[message for _, message, _ in BAD_FILES])
def test_a_feature_file_that_makes_no_sense_is_refused_by_file_and_key(values, write, text, message, tip):
    path = write(text)
    with pytest.raises(OptionError) as error:
        read_features(Data(values), features="interest", feature_file=path)
    assert error.value.message.startswith(path)
    assert message.replace("FILE", path) in error.value.message
    assert tip in error.value.tip


def test_a_feature_file_that_is_not_there_is_refused_with_an_example(values, tmp_path):
    with pytest.raises(OptionError, match=r"nothing\.toml: there is no such feature file") as error:
        read_features(Data(values), feature_file=str(tmp_path / "nothing.toml"))
    assert "[features.interest]" in error.value.tip


# Categories


@pytest.mark.parametrize("features", ["ltv,property", "ltv,Property", "ltv,house,flat,land", "1,5:8"])
def test_a_one_hot_feature_is_chosen_by_its_name_or_all_its_columns(values, write, features):
    table = read_features(Data(values), features=features, feature_file=write(HOME + "weight = 2\n"))
    assert table.names == ("ltv",)
    (group,) = table.groups
    assert (group.name, group.names, group.weight) == ("property", ("house", "flat", "land"), 2)
    assert group.index.tolist() == [5, 6, 7]


def test_an_unknown_feature_is_refused_with_the_one_hot_features_too(values, write):
    with pytest.raises(OptionError, match="no feature is called 'proprty'") as error:
        read_features(Data(values), features="proprty", feature_file=write(HOME))
    assert error.value.tip.endswith("One-hot features: property.")


def test_part_of_a_one_hot_feature_cannot_be_chosen(values, write):
    with pytest.raises(OptionError, match="'house' is one category of 'property'") as error:
        read_features(Data(values), features="0:6", feature_file=write(HOME))
    assert "property" in error.value.tip


def test_a_category_is_read_from_standardised_float32_columns_and_written_back(values, write):
    offset, scale = values.mean(0), values.std(0)
    data = Data(values, offset=offset, scale=scale, dtype=torch.float32)
    (group,) = read_features(data, features="property", feature_file=write(HOME)).groups
    points = torch.cat([inputs for inputs, _ in data]).numpy()
    assert [group.category(point) for point in points] == [0, 1, 2] * 4
    assert group.category_of(points[:, group.index]).tolist() == [0, 1, 2] * 4
    for category in range(3):
        changed = points[0].astype(np.float64)
        changed[group.index] = group.inputs(category)
        assert group.category(changed) == category
        np.testing.assert_allclose(changed[5:], (np.eye(3)[category] - offset[5:]) / scale[5:])


def test_all_zero_is_a_category_only_where_the_file_says_so(values, write):
    values[3, 5:] = 0
    with pytest.raises(OptionError, match="'property' is not one-hot: a sample has 0, 0, 0 in house"):
        read_features(Data(values), features="property", feature_file=write(HOME))
    path = write(HOME + "baseline = true\n")
    (group,) = read_features(Data(values), features="property", feature_file=path).groups
    assert group.categories == ("house", "flat", "land", "none of these")
    assert group.category(values[3]) == 3
    assert group.inputs(3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("columns", [[1, 1, 0], [0.5, 0.5, 0], [2, 0, 0]])
def test_columns_that_are_not_one_hot_are_refused(values, write, columns):
    values[7, 5:] = columns
    with pytest.raises(OptionError, match="'property' is not one-hot") as error:
        read_features(Data(values), feature_file=write(HOME))
    assert "offset and scale" in error.value.tip


# Samples

DECIDED = np.arange(40) % 2


def test_samples_are_taken_by_number_in_the_order_given():
    assert choose_samples(None, DECIDED, sample="17").tolist() == [17]
    assert choose_samples(None, DECIDED, sample="17, 3,17,-1").tolist() == [17, 3, 39]
    assert choose_samples(None, DECIDED, samples="3,17,4").tolist() == [3, 17, 4]
    assert choose_samples(None, DECIDED, samples="3,").tolist() == [3]
    assert choose_samples(None, DECIDED, samples="all").tolist() == list(range(40))


def test_a_draw_is_fixed_by_its_seed_and_a_larger_one_holds_a_smaller_one():
    state = torch.get_rng_state()
    few, many = (choose_samples(None, DECIDED, samples=n, seed=3) for n in ("5", "20"))
    assert (len(few), len(many)) == (5, 20)
    assert set(few) < set(many)
    assert (np.diff(many) > 0).all()
    assert choose_samples(None, DECIDED, samples="20", seed=4).tolist() != many.tolist()
    assert choose_samples(None, DECIDED, samples="99").tolist() == list(range(40))
    assert len(choose_samples(None, DECIDED)) == 10
    assert torch.equal(torch.get_rng_state(), state)


def test_misclassified_samples_are_those_with_a_known_class_that_is_not_decided():
    labels = DECIDED.copy()
    labels[[4, 9, 30]] = 1 - labels[[4, 9, 30]]
    labels[7] = -1
    assert choose_samples(labels, DECIDED, samples="misclassified").tolist() == [4, 9, 30]
    assert set(choose_samples(labels, DECIDED, samples="misclassified:2")) < {4, 9, 30}
    assert choose_samples(labels, DECIDED, samples="misclassified:9").tolist() == [4, 9, 30]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample": "3", "samples": "4"}, "sample and samples are both given"),
        ({"sample": "40"}, "sample: there is no sample 40"),
        ({"samples": "3,-41"}, "samples: there is no sample -41"),
        ({"sample": "a"}, "sample: 'a' are no numbers"),
        ({"sample": ","}, "sample: ',' names no sample"),
        ({"samples": "0"}, "samples: '0' is no number of samples"),
        ({"samples": "-3"}, "samples: '-3' is no number of samples"),
        ({"samples": "wrong"}, "samples: 'wrong' is no number of samples"),
        ({"samples": "misclassified:x"}, "samples: 'x' is no number of samples"),
        ({"samples": "misclassified"}, "none of 40 is misclassified"),
    ],
)
def test_samples_that_are_not_there_are_refused(given, message):
    with pytest.raises(OptionError) as error:
        choose_samples(DECIDED, DECIDED, **given)
    assert message in error.value.message
    assert error.value.tip


def test_misclassified_needs_classes():
    with pytest.raises(OptionError, match="targets are no classes"):
        choose_samples(None, DECIDED, samples="misclassified")


def test_whole_numbers_and_probabilities_are_classes_and_nothing_else():
    assert class_labels(torch.tensor([1, 0, -100]), 2).tolist() == [1, 0, -1]
    assert class_labels(torch.tensor([[1.0], [0.0]]), 2).tolist() == [1, 0]
    assert class_labels(np.array([0.0, 1.0]), 2).tolist() == [0, 1]
    assert class_labels(torch.tensor([[0.1, 0.9], [1, 0]]), 2).tolist() == [1, 0]
    for no_classes in ([0.5, 1.0], [0, 2], [float("nan"), 1], [-100, -100], [[0.2, 0.2]], [[1, 0, 0]]):
        assert class_labels(torch.tensor(no_classes), 2) is None


@pytest.mark.parametrize("option", ["ranges", "stability"])
def test_what_is_said_of_a_feature_that_may_not_change_is_refused(values, option):
    said = {"ranges": "interest=0:5", "stability": "interest=0.5"}[option]
    with pytest.raises(OptionError, match=f"{option} interest: not among the features that may change"):
        read_features(Data(values), features="ltv", **{option: said})
