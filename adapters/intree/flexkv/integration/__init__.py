"""Doors for engines that have a FlexKV connector of their own."""
