"""FlexKV's adapter for SGLang: words and hooks of SGLang, no cache logic."""
