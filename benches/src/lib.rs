//! Benchmarks of pvio against the raw limits of the machine
