//! The vif frontend: a guest's virtual NIC
