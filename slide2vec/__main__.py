"""`python -m slide2vec` is the `slide2vec` command."""

from slide2vec.cli import main

if __name__ == "__main__":
    main()
