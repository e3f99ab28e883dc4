"""The cloud-side program that answers hand-offs."""
