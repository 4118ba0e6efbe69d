"""Where versions of SGLang differ. Nothing outside this package asks for a version or reaches into an object's private parts."""
