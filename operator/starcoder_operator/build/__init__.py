"""Manifests of a run's objects, one builder a kind. Pure: what goes in decides what comes out."""
