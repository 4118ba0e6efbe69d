"""Where versions of vLLM differ. Nothing outside this package asks for a version or reaches into an object's private parts."""
