/// What one unprivileged domain may hold, all its connections together. Dom0 is exempt, except
/// from [`Quota::outstanding`] and [`Quota::events`], which bound every connection.
///
/// The defaults are those of Xen 4.17's `xenstored`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota {
    /// Nodes the domain owns.
    pub nodes: usize,
    /// Watches.
    pub watches: usize,
    /// Open transactions.
    pub transactions: usize,
    /// Nodes looked at or changed in one transaction.
    pub transaction_nodes: usize,
    /// Bytes of one node: its value, its permissions (8 each) and the names of its children.
    pub node_size: usize,
    /// Permission entries of one node.
    pub perms: usize,
    /// Answers not yet taken, per connection; beyond, requests are not accepted.
    pub outstanding: usize,
    /// Bytes held on the domain's behalf: nodes, watches, transactions.
    pub memory: usize,
    /// Distinct events waiting, per connection; beyond, events collapse into one per watch.
    pub events: usize,
}

impl Quota {
    /// Those of Xen 4.17's `xenstored`.
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
