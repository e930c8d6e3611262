/// Limits of one unprivileged domain, over all of its connections. Dom0 is exempt, except from
/// [`Quota::outstanding`] and [`Quota::events`], which limit every connection.
///
/// The defaults are those of Xen 4.17's `xenstored`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota {
    /// Number of nodes that the domain owns.
    pub nodes: usize,
    /// Number of watches.
    pub watches: usize,
    /// Number of open transactions.
    pub transactions: usize,
    /// Number of nodes read or changed in one transaction.
    pub transaction_nodes: usize,
    /// Size of one node in bytes: its value, its permissions (8 each) and the names of its
    /// children.
    pub node_size: usize,
    /// Number of permission entries of one node.
    pub perms: usize,
    /// Number of responses not yet taken, per connection; beyond it, requests are not accepted.
    pub outstanding: usize,
    /// Bytes of memory for the domain: nodes, watches, transactions.
    pub memory: usize,
    /// Number of distinct queued events, per connection; beyond it, events are reduced to one per
    /// watch.
    pub events: usize,
}

impl Quota {
    /// The quotas of Xen 4.17's `xenstored`.
    pub const XEN: Self = Self {
        nodes: 1000,
        watches: 128,
        transactions: 10,
        transaction_nodes: 1024,
        node_size: 2048,
        perms: 5,
        outstanding: 20,
        memory: 2_621_440,
        events: 1024,
    };
}

impl Default for Quota {
    fn default() -> Self {
        Self::XEN
    }
}
