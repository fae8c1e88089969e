"""Every architecture by every route: `make matrix` runs them and writes docs/matrix.md."""
