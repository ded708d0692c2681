"""FX graph rewrites, one file per pass; ``pipeline`` orders them."""

if __name__ != "bicompile.passes":
    raise ImportError("import bicompile.passes, not passes")
