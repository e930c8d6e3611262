//! A whole machine in one thread, driven by a seed
