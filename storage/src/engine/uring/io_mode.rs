/// The way operations are submitted to the kernel and completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoMode {
    /// One system call for each batch.
    #[default]
    Normal,
    /// A kernel thread polls the submission queue (`IORING_SETUP_SQPOLL`): no system calls, but one
    /// CPU is busy while there is I/O.
    SqPoll,
    /// Submission as in `Normal`, but reads and writes complete by polling the device instead of by
    /// interrupt (`IORING_SETUP_IOPOLL`): one CPU is busy while any are in flight. Requires
    /// `O_DIRECT` and a device with poll queues.
    IoPoll,
}

impl IoMode {
    /// Returns the name used in options.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::SqPoll => "sqpoll",
            Self::IoPoll => "iopoll",
        }
    }
}
