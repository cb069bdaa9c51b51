"""Fault cases: each injects one kind of fault into real runs and checks that what opd promises for it holds. See README.md here."""
