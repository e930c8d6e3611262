/// Negotiated features of a vif. Features that are not listed here are not used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[expect(clippy::struct_excessive_bools, reason = "each is a separate feature of the protocol")]
pub struct Features {
    /// The guest accepts packets scattered over several buffers (`feature-sg`).
    pub sg: bool,
    /// The guest completes blank checksums over IPv4 (no `feature-no-csum-offload`).
    pub checksum_v4: bool,
    /// The guest completes blank checksums over IPv6 (`feature-ipv6-csum-offload`).
    pub checksum_v6: bool,
    /// The guest accepts unsegmented TCP over IPv4 (the frontend's `feature-gso-tcpv4`).
    pub gso_v4: bool,
    /// The guest accepts unsegmented TCP over IPv6 (the frontend's `feature-gso-tcpv6`).
    pub gso_v6: bool,
    /// The guest accepts unsegmented TCP over IPv4 in the old form, with the segment size in a separate
    /// slot before the packet (the frontend's `feature-gso-tcpv4-prefix`).
    pub gso_prefix_v4: bool,
    /// The guest accepts unsegmented TCP over IPv6 in the old form (`feature-gso-tcpv6-prefix`).
    pub gso_prefix_v6: bool,
    /// The guest may send unsegmented TCP over IPv4 (the backend's `feature-gso-tcpv4`), independently
    /// of what it accepts.
    pub sends_gso_v4: bool,
    /// The guest may send unsegmented TCP over IPv6 (the backend's `feature-gso-tcpv6`).
    pub sends_gso_v6: bool,
    /// The guest may select multicast groups (the backend's `feature-multicast-control`).
    pub names_groups: bool,
    /// The guest sends an event when it posts buffers (`feature-rx-notify`), so packets may wait for
    /// buffers.
    pub rx_notify: bool,
}

impl Features {
    /// Features of a guest that writes no feature key.
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
