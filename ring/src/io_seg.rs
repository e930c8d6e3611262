/// A stretch of a buffer, owning the buffer: what an I/O operation is made of. Whoever has the
/// operation has the memory, so it cannot be freed or unmapped before the operation is over.
#[derive(Debug)]
pub struct IoSeg<B> {
    /// The buffer.
    pub buf: B,
    /// Where the stretch begins, in bytes.
    pub offset: usize,
    /// Its length in bytes.
    pub len: usize,
}
