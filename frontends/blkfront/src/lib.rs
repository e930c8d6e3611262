//! The vbd frontend: a guest's virtual disk
