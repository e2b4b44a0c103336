"""scienceworld."""
