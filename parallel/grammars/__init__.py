"""From patterns to tables over tokens: what `jaxfm.parallel.grammar` reads on the device."""
