"""Measurements. Each prints one JSON object a line on stdout and nothing else; progress goes to stderr."""
