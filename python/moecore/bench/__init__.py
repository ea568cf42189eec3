"""``python -m moecore bench``: every op and the layer beside its peers and the roof, as table and JSON lines.

`cases` names what is measured, `workloads` prepares it and checks it against float64, `peers` calls other
libraries on the same inputs, `spaces` holds arrays and clocks of a device, `harness` runs it all, `compare`
holds two results against each other, `tune` searches launch policies.
"""
