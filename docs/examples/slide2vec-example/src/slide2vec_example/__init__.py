"""One of each that a package can add to slide2vec."""
