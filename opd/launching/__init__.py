"""Several processes for the user: the launcher that is started, and how its processes say what became of them."""
