"""`python -m dynprobe.cli`."""

from dynprobe.cli.app import main

if __name__ == "__main__":
    main()
