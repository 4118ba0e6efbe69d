"""Tests that ill-treat the SSD tier and look at every byte that comes back: kills, damage on the media. No engine takes part."""
