"""FlexKV's core: prefix index, tiers and transfers. Imports no torch, no triton and no engine."""
