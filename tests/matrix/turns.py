"""The trouble that the loads of ``troubled_connector.py`` have, a turn each; later loads go well."""

from __future__ import annotations

NOTHING_COMES, MIDDLE_IS_MISSING, SLOW, WELL = range(4)
SLOW_S = 1.0
