//! The socket that clients of `-o` send to.
//!
//! A socket that is bound to every address of a machine must answer from the one that its client asked, or the client
//! takes the answer for somebody else's. So each datagram comes with the address it was sent to (`IP_PKTINFO` of ip(7),
//! `IPV6_PKTINFO` of ipv6(7)), which is part of the flow's name, and the answers name it again.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::ptr;

use mio::net::UdpSocket;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use socket2::{SockAddr, SockAddrStorage};

/// A client, as a flow knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Client {
    address: SocketAddr,
    /// Our address that it sends to; none if that cannot be an answer's source.
    ours: Option<IpAddr>,
    /// The interface of `ours`; 0 if any will do.
    interface: u32,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct ClientSocket {
    socket: UdpSocket,
    is_ipv4: bool,
}

/// Room for one control message with either family's `PKTINFO`, aligned as `cmsghdr` must be.
#[repr(C)]
union Control {
    _align: libc::cmsghdr,
    bytes: [u8; 64],
}

impl ClientSocket {
    pub(super) fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        let (level, name) = match address {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_PKTINFO),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        };
        let on: libc::c_int = 1;
        // SAFETY: the option's value is an int that lives through the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                name,
                ptr::from_ref(&on).cast(),
                socklen::<libc::c_int>(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(ClientSocket {
            socket,
            is_ipv4: address.is_ipv4(),
        })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Its events, edge-triggered, under `token`.
    pub(super) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(
            &mut SourceFd(&self.socket.as_raw_fd()),
            token,
            Interest::READABLE,
        )
    }

    /// The next datagram's length in `buffer`, and who sent it.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Client)> {
        let mut from = SockAddrStorage::zeroed();
        let mut control = Control { bytes: [0; 64] };
        let mut iov = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: all zeroes is a valid, empty message.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_name = ptr::from_mut(&mut from).cast();
        message.msg_namelen = from.size_of();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = ptr::from_mut(&mut control).cast();
        message.msg_controllen = size_of::<Control>() as _;
        // SAFETY: the message's pointers are to memory that lives through the call and is as long as it says.
        let n = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: the kernel wrote `msg_namelen` bytes of an address.
        let from = unsafe { SockAddr::new(from, message.msg_namelen) };
        let address = from.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        let (ours, interface) = destination(&message);
        let client = Client {
            address,
            ours,
            interface,
        };
        Ok((n, client))
    }

    /// Sends a datagram to `client`, from the address that it knows.
    pub(super) fn send(&self, client: &Client, datagram: &[u8]) -> io::Result<()> {
        let to = SockAddr::from(client.address);
        let mut control = Control { bytes: [0; 64] };
        let mut iov = libc::iovec {
            iov_base: datagram.as_ptr().cast_mut().cast(),
            iov_len: datagram.len(),
        };
        // SAFETY: all zeroes is a valid, empty message.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_name = to.as_ptr().cast_mut().cast();
        message.msg_namelen = to.len();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = ptr::from_mut(&mut control).cast();
        message.msg_controllen = size_of::<Control>() as _;
        let length = self.name_source(&message, client);
        message.msg_controllen = length as _;
        // SAFETY: as in `receive`; the kernel only reads.
        match unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, 0) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Writes the control message that makes our address of `client` the source; its length.
    fn name_source(&self, message: &libc::msghdr, client: &Client) -> usize {
        match client.ours {
            Some(IpAddr::V4(ip)) if self.is_ipv4 => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr {
                        s_addr: u32::from(ip).to_be(),
                    },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                put_control(message, libc::IPPROTO_IP, libc::IP_PKTINFO, info)
            }
            Some(IpAddr::V6(ip)) if !self.is_ipv4 => {
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr {
                        s6_addr: ip.octets(),
                    },
                    ipi6_ifindex: client.interface,
                };
                put_control(message, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info)
            }
            _ => 0,
        }
    }
}

/// Which of our addresses a received message was sent to, and the interface where that is part of the address.
fn destination(message: &libc::msghdr) -> (Option<IpAddr>, u32) {
    // SAFETY: the kernel left sound control messages, and the macro stays within them.
    let Some(header) = (unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }) else {
        return (None, 0);
    };
    // SAFETY: points behind `header`; only read below where the kind says what is there.
    let data = unsafe { libc::CMSG_DATA(header) };
    match (header.cmsg_level, header.cmsg_type) {
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
            // SAFETY: this kind of message carries an `in_pktinfo`.
            let info: libc::in_pktinfo = unsafe { ptr::read_unaligned(data.cast()) };
            // The address that answers would come from: for a broadcast, not the one sent to.
            let ip = u32::from_be(info.ipi_spec_dst.s_addr).to_be_bytes();
            (Some(ip.into()), 0)
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
            // SAFETY: this kind of message carries an `in6_pktinfo`.
            let info: libc::in6_pktinfo = unsafe { ptr::read_unaligned(data.cast()) };
            let ip = std::net::Ipv6Addr::from(info.ipi6_addr.s6_addr);
            let interface = if ip.is_unicast_link_local() {
                info.ipi6_ifindex
            } else {
                0
            };
            ((!ip.is_multicast()).then_some(ip.into()), interface)
        }
        _ => (None, 0),
    }
}

/// Makes `value` the one control message of `message`, whose control buffer is a [`Control`]; its length.
fn put_control<T: Copy>(message: &libc::msghdr, level: i32, kind: i32, value: T) -> usize {
    let size = u32::try_from(size_of::<T>()).expect("a few bytes");
    // SAFETY: the buffer is aligned and longer than any `PKTINFO` with its header, so there is a first header, and room for
    // `value` behind it.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(message);
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = libc::CMSG_LEN(size) as _;
        ptr::write_unaligned(libc::CMSG_DATA(header).cast(), value);
        libc::CMSG_SPACE(size) as usize
    }
}

fn socklen<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("a few bytes")
}
