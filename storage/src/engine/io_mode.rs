/// How operations reach the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoMode {
    /// By a system call for each batch.
    #[default]
    Normal,
    /// By a thread of the kernel's that looks for itself (`IORING_SETUP_SQPOLL`): no system call,
    /// and a processor that is busy as long as there is I/O.
    SqPoll,
    /// As usual, but reads and writes end when the device is looked at and not by its interrupt
    /// (`IORING_SETUP_IOPOLL`): a processor is busy as long as there are any. Takes `O_DIRECT`, and
    /// a device with queues for that.
    IoPoll,
}

impl IoMode {
    /// As it is written.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::SqPoll => "sqpoll",
            Self::IoPoll => "iopoll",
        }
    }
}
