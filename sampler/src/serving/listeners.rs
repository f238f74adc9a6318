//! The TCP sockets that processes listen on, from /proc: tables of a network namespace joined with the descriptors of a process.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// The kernel lists listening sockets before all others, so the beginning of a table has them.
const MAX_TABLE_BYTES: u64 = 1 << 20;
/// Descriptors that are read of one process: servers open their listening sockets early.
const MAX_DESCRIPTORS: usize = 4096;
/// The state of a listening socket in these tables.
const LISTEN: &str = "0A";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListeningSocket {
    pub address: SocketAddr,
    pub inode: u64,
}

/// The listening sockets of the network namespace of a process.
pub fn of_namespace(process: &Path) -> io::Result<Vec<ListeningSocket>> {
    let mut all = parse(&table(&process.join("net/tcp"))?);
    match table(&process.join("net/tcp6")) {
        Ok(text) => all.extend(parse(&text)),
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(all)
}

fn table(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_TABLE_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

pub fn parse(table: &str) -> Vec<ListeningSocket> {
    let socket = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (local, state) = (fields.nth(1)?, fields.nth(1)?);
        (state == LISTEN).then_some(())?;
        // tx_queue:rx_queue, tr:tm->when, retrnsmt, uid, timeout, inode
        Some(ListeningSocket { address: address(local)?, inode: fields.nth(5)?.parse().ok()? })
    };
    table.lines().skip(1).filter_map(socket).collect()
}

/// Words of the address are printed as numbers in the byte order of the machine, the port as a number.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |n: usize| Some(u32::from_str_radix(address.get(8 * n..8 * n + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match address.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for n in 0..4 {
                bytes[4 * n..4 * n + 4].copy_from_slice(&word(n)?);
            }
            IpAddr::from(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Device and inode of the network namespace of a process, which identify it.
pub fn network_namespace(process: &Path) -> io::Result<(u64, u64)> {
    let namespace = fs::metadata(process.join("ns/net"))?;
    Ok((namespace.dev(), namespace.ino()))
}

/// Inodes of the sockets that a process has open, of as many descriptors as are left to read. Empty if it has ended.
pub fn socket_inodes(process: &Path, left: &mut usize) -> io::Result<BTreeSet<u64>> {
    let inode = |entry: io::Result<fs::DirEntry>| {
        let link = fs::read_link(entry.ok()?.path()).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    match fs::read_dir(process.join("fd")) {
        Ok(entries) => {
            let mut read = 0;
            let entries = entries.take(MAX_DESCRIPTORS.min(*left)).inspect(|_| read += 1);
            let inodes = entries.filter_map(inode).collect();
            *left -= read;
            Ok(inodes)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

/// Where to connect to reach a listening socket from inside its namespace. A socket of all IPv6 addresses usually accepts IPv4 too, and
/// containers often have IPv6 switched off.
pub fn reachable(listening: SocketAddr) -> Vec<SocketAddr> {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let at = |ip: IpAddr| SocketAddr::new(ip, listening.port());
    match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => vec![at(v4)],
        IpAddr::V6(ip) if ip.is_unspecified() => vec![at(v4), at(v6)],
        IpAddr::V6(ip) => vec![at(ip.to_ipv4_mapped().map_or(IpAddr::from(ip), IpAddr::from))],
        IpAddr::V4(_) => vec![listening],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
        0: 00000000:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 1 0000000000000000 100 0 0 10 0\n\
        1: 0100007F:7530 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 777 1 0000000000000000 100 0 0 10 0\n\
        2: 0100007F:1F40 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 9 1 0000000000000000 20 4 30 10 -1\n\
        3: garbage\n";
    const TABLE6: &str = "  sl  local_address                         remote_address                        st ..\n\
        0: 00000000000000000000000000000000:1F42 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 55 1\n\
        1: 0000000000000000FFFF00000100007F:1F43 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 56 1\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn listening_sockets_are_read_from_both_tables() {
        let of = |table| parse(table).iter().map(|socket| (socket.address.to_string(), socket.inode)).collect::<Vec<_>>();
        assert_eq!(of(TABLE), [("0.0.0.0:8000".to_owned(), 12345), ("127.0.0.1:30000".to_owned(), 777)]);
        assert_eq!(of(TABLE6), [("[::]:8002".to_owned(), 55), ("[::ffff:127.0.0.1]:8003".to_owned(), 56)]);
    }

    #[test]
    fn a_socket_is_reached_by_loopback_where_it_accepts_that() {
        let of = |text: &str| reachable(text.parse().unwrap()).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(of("0.0.0.0:80"), ["127.0.0.1:80"]);
        assert_eq!(of("[::]:80"), ["127.0.0.1:80", "[::1]:80"]);
        assert_eq!(of("[::ffff:10.0.0.7]:80"), ["10.0.0.7:80"]);
        assert_eq!(of("10.0.0.7:80"), ["10.0.0.7:80"]);
    }

    #[test]
    fn the_socket_of_this_process_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let process = Path::new("/proc/self");
        let mut left = MAX_DESCRIPTORS;
        let inodes = socket_inodes(process, &mut left).unwrap();
        let found = of_namespace(process).unwrap().into_iter().find(|socket| socket.address == listener.local_addr().unwrap());
        assert!(found.is_some_and(|socket| inodes.contains(&socket.inode)), "{found:?}");
        assert!(left < MAX_DESCRIPTORS);
        assert_eq!(socket_inodes(process, &mut 0).unwrap(), BTreeSet::new());
    }
}
