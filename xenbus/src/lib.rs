//! xenstore wire codec, client and server; the xenbus device handshake
