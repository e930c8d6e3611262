/// A range of a buffer, together with the buffer: one segment of an I/O operation. The operation
/// owns the memory, so it cannot be freed or unmapped before the operation has completed.
#[derive(Debug)]
pub struct IoSeg<B> {
    /// The buffer.
    pub buf: B,
    /// Offset of the range, in bytes.
    pub offset: usize,
    /// Length of the range, in bytes.
    pub len: usize,
}
