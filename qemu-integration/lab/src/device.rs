//! QEMU arguments for the devices that can lie between host and guest: consoles, serial ports, a network, vsock.

use std::path::Path;

/// How the vhost-user console is put into the guest.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// Queues: `2 * (ports + 1)` with the multiport feature.
    pub num_vqs: u32,
    /// Size of the device's configuration space.
    pub config_size: u32,
    /// Entries of each queue.
    pub vq_size: u32,
    /// Name of the chardev, when a guest has several.
    pub id: String,
    /// More properties of `-device`, such as `addr=5`.
    pub more: String,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            num_vqs: 4,
            config_size: 12,
            vq_size: 1024,
            id: "vp".to_owned(),
            more: String::new(),
        }
    }
}

/// A console whose device is the daemon that listens on `socket`.
pub fn vhost_user_console(socket: &Path, options: &DeviceOptions) -> Vec<String> {
    let DeviceOptions {
        num_vqs,
        config_size,
        vq_size,
        id,
        more,
    } = options;
    let more = if more.is_empty() {
        String::new()
    } else {
        format!(",{more}")
    };
    let sizes = format!("num_vqs={num_vqs},config_size={config_size},vq_size={vq_size}");
    vec![
        "-chardev".to_owned(),
        format!("socket,id={id},path={}", socket.display()),
        "-device".to_owned(),
        format!(
            "{},chardev={id},virtio-id=3,{sizes}{more}",
            crate::qemu::DEVICE
        ),
    ]
}

/// The host end of a port of QEMU's own devices: a UNIX socket, one way round or the other.
#[derive(Debug, Clone, Copy)]
pub enum Chardev<'a> {
    /// QEMU listens there, and the guest starts without waiting for anybody.
    Listens(&'a Path),
    /// QEMU connects to it, and tries again every 100 ms when it cannot.
    Connects(&'a Path),
}

impl Chardev<'_> {
    fn arguments(self, id: &str) -> [String; 2] {
        let (path, mode) = match self {
            Self::Listens(path) => (path, "server=on,wait=off"),
            Self::Connects(path) => (path, "server=off,reconnect-ms=100"),
        };
        let socket = format!("socket,id={id},path={},{mode}", path.display());
        ["-chardev".to_owned(), socket]
    }
}

/// A port of QEMU's own console device, with its name, which no other port of the guest has.
#[derive(Debug, Clone, Copy)]
pub enum SerialPort<'a> {
    /// A raw port: `/dev/vportNpM` in the guest.
    Generic(&'a str, Chardev<'a>),
    /// A console: `/dev/hvcN` in the guest.
    Console(&'a str, Chardev<'a>),
}

/// QEMU's own console device with these ports. Works with every QEMU.
pub fn virtio_serial(ports: &[SerialPort<'_>]) -> Vec<String> {
    let mut arguments = vec!["-device".to_owned(), "virtio-serial-pci".to_owned()];
    for port in ports {
        let (device, name, chardev) = match *port {
            SerialPort::Generic(name, chardev) => ("virtserialport", name, chardev),
            SerialPort::Console(name, chardev) => ("virtconsole", name, chardev),
        };
        // The lab's own chardevs have plain names.
        let id = format!("port-{name}");
        arguments.extend(chardev.arguments(&id));
        let device = format!("{device},chardev={id},name={name}");
        arguments.extend(["-device".to_owned(), device]);
    }
    arguments
}

/// The same with one raw port; QEMU listens on `socket`.
pub fn virtserialport(socket: &Path, name: &str) -> Vec<String> {
    virtio_serial(&[SerialPort::Generic(name, Chardev::Listens(socket))])
}

/// A third 16550 serial port (`/dev/ttyS2` in the guest); QEMU listens on `socket`.
pub fn isa_serial(socket: &Path) -> Vec<String> {
    let mut arguments = Vec::from(Chardev::Listens(socket).arguments("isa0"));
    arguments.extend(["-serial".to_owned(), "chardev:isa0".to_owned()]);
    arguments
}

/// A network card on QEMU's user network; see [`crate::GuestOptions::user_network`].
pub(crate) fn user_network(forwards: &[(&str, u16)]) -> Vec<String> {
    let forwards: String = forwards
        .iter()
        .map(|(address, port)| format!(",hostfwd=tcp:{address}-:{port}"))
        .collect();
    // No boot from the network, so no firmware for it.
    [
        "-netdev".to_owned(),
        format!("user,id=net0{forwards}"),
        "-device".to_owned(),
        "virtio-net-pci,netdev=net0,romfile=".to_owned(),
    ]
    .into()
}

/// A network card whose device is the process that listens on `socket`; see [`crate::GuestOptions::vhost_user_network`].
pub(crate) fn vhost_user_network(socket: &Path) -> Vec<String> {
    [
        "-chardev".to_owned(),
        format!("socket,id=net0,path={}", socket.display()),
        "-netdev".to_owned(),
        "vhost-user,id=net0,chardev=net0".to_owned(),
        "-device".to_owned(),
        "virtio-net-pci,netdev=net0,romfile=".to_owned(),
    ]
    .into()
}

/// A vsock device that another process listens for on `socket`; see [`crate::VsockDevice`].
pub(crate) fn vhost_user_vsock(socket: &Path) -> Vec<String> {
    [
        "-chardev".to_owned(),
        format!("socket,id=vsock0,path={}", socket.display()),
        "-device".to_owned(),
        "vhost-user-vsock-pci,chardev=vsock0".to_owned(),
    ]
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_line() {
        let line =
            vhost_user_console(Path::new("/run/vp.sock"), &DeviceOptions::default()).join(" ");
        assert_eq!(
            line,
            "-chardev socket,id=vp,path=/run/vp.sock -device vhost-user-test-device-pci,chardev=vp,virtio-id=3,\
             num_vqs=4,config_size=12,vq_size=1024"
        );
    }
}
