//! A xenstored on a socket: `xenstored <path>`. Set `XENSTORED_PATH=<path>` for its clients. It
//! exits at the end of its standard input.

use std::io::Read;

use pvio_xenstored::Store;
use pvio_xenstored::server::Server;

fn main() -> std::io::Result<()> {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: xenstored <socket path>");
        std::process::exit(2);
    };
    let server = Server::new(Store::default()).listen(&path)?.spawn()?;
    println!("{}", path.display());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.shutdown();
    Ok(())
}
