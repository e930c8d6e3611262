/// What was negotiated for a vif. Nothing that is not in here is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a feature of the protocol by itself")]
pub struct Features {
    /// The guest takes packets scattered over several buffers (`feature-sg`).
    pub sg: bool,
    /// The guest completes blank checksums over IPv4 (no `feature-no-csum-offload`).
    pub checksum_v4: bool,
    /// The same over IPv6 (`feature-ipv6-csum-offload`).
    pub checksum_v6: bool,
    /// The guest takes TCP over IPv4 unsegmented (the frontend's `feature-gso-tcpv4`).
    pub gso_v4: bool,
    /// The same over IPv6 (the frontend's `feature-gso-tcpv6`).
    pub gso_v6: bool,
    /// The guest takes TCP over IPv4 unsegmented in the old form, with the segment size in a slot of
    /// its own before the packet (the frontend's `feature-gso-tcpv4-prefix`).
    pub gso_prefix_v4: bool,
    /// The same over IPv6 (`feature-gso-tcpv6-prefix`).
    pub gso_prefix_v6: bool,
    /// The guest may send TCP over IPv4 unsegmented (the backend's `feature-gso-tcpv4`). It may do
    /// so and not take any.
    pub sends_gso_v4: bool,
    /// The same over IPv6 (the backend's `feature-gso-tcpv6`).
    pub sends_gso_v6: bool,
    /// The guest may name multicast groups (the backend's `feature-multicast-control`).
    pub names_groups: bool,
    /// The guest sends an event when it posts buffers (`feature-rx-notify`), so packets may wait
    /// for them.
    pub rx_notify: bool,
}

impl Features {
    /// What a guest gets that writes no feature key at all.
    pub const LEAST: Self = Self {
        sg: false,
        checksum_v4: true,
        checksum_v6: false,
        gso_v4: false,
        gso_v6: false,
        gso_prefix_v4: false,
        gso_prefix_v6: false,
        sends_gso_v4: false,
        sends_gso_v6: false,
        names_groups: false,
        rx_notify: false,
    };
}
