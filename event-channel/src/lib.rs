//! Event channels: waking another domain
