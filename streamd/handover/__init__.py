"""Records of live objects, with which a worker hands them over to its successor."""
