//! QEMU arguments for the ways a guest can get a console port.

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

/// A port of QEMU's own console device; QEMU listens on `socket`. Works with every QEMU.
pub fn virtserialport(socket: &Path, name: &str) -> Vec<String> {
    let socket = socket.display();
    [
        "-device".to_owned(),
        "virtio-serial-pci".to_owned(),
        "-chardev".to_owned(),
        format!("socket,id=port0,path={socket},server=on,wait=off"),
        "-device".to_owned(),
        format!("virtserialport,chardev=port0,name={name}"),
    ]
    .into()
}

/// A third 16550 serial port (`/dev/ttyS2` in the guest); QEMU listens on `socket`.
pub fn isa_serial(socket: &Path) -> Vec<String> {
    let socket = socket.display();
    [
        "-chardev".to_owned(),
        format!("socket,id=isa0,path={socket},server=on,wait=off"),
        "-serial".to_owned(),
        "chardev:isa0".to_owned(),
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
