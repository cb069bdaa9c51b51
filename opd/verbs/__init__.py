"""The verbs of the command line besides `train`: each reads its arguments and calls one task."""
