//! Finding a virtio block device by the serial number that the host gave it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Devices are probed within milliseconds of their driver's start; an emulated machine takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often sysfs is looked at.
const STEP: Duration = Duration::from_millis(1);

/// Waits for the disk, or its partition, and returns the device's path.
pub fn wait_for(serial: &str, partition: Option<u32>) -> Result<PathBuf> {
    let deadline = Instant::now() + PATIENCE;
    let sysfs = Path::new("/sys/block");
    loop {
        if let Some(name) = find(sysfs, serial, partition)? {
            let device = Path::new("/dev").join(name);
            if device.exists() {
                return Ok(device);
            }
        }
        if Instant::now() >= deadline {
            let what = partition.map_or_else(
                || "disk".to_owned(),
                |number| format!("partition {number} on a disk"),
            );
            bail!(
                "the machine has no {what} with the serial number {serial}; its disks are: {}",
                describe(sysfs)?
            );
        }
        thread::sleep(STEP);
    }
}

/// The kernel's name of the disk or partition.
fn find(sysfs: &Path, serial: &str, partition: Option<u32>) -> io::Result<Option<String>> {
    for (disk, found) in disks(sysfs)? {
        if found != serial {
            continue;
        }
        let Some(number) = partition else {
            return Ok(Some(disk));
        };
        for name in names(&sysfs.join(&disk))? {
            let attribute = sysfs.join(&disk).join(&name).join("partition");
            if read_trimmed(&attribute).is_some_and(|text| text.parse() == Ok(number)) {
                return Ok(Some(name));
            }
        }
    }
    Ok(None)
}

/// All disks with a serial number, and the number.
fn disks(sysfs: &Path) -> io::Result<Vec<(String, String)>> {
    let with_serial =
        |name: String| read_trimmed(&sysfs.join(&name).join("serial")).map(|serial| (name, serial));
    Ok(names(sysfs)?.into_iter().filter_map(with_serial).collect())
}

fn describe(sysfs: &Path) -> io::Result<String> {
    let disks = disks(sysfs)?;
    if disks.is_empty() {
        return Ok("none (is the virtio block driver loaded?)".to_owned());
    }
    let named: Vec<String> = disks
        .iter()
        .map(|(name, serial)| format!("{name} ({serial})"))
        .collect();
    Ok(named.join(", "))
}

/// A kernel without block devices has no such directory: then nothing is there.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

/// An attribute that is not there, or goes away meanwhile, does not match.
fn read_trimmed(attribute: &Path) -> Option<String> {
    let text = fs::read_to_string(attribute).ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_partitions_are_found_by_serial_number() {
        let sysfs = tempfile::tempdir().unwrap();
        for (disk, serial) in [("vda", "root\n"), ("vdb", "data")] {
            fs::create_dir_all(sysfs.path().join(disk).join(format!("{disk}2"))).unwrap();
            fs::write(sysfs.path().join(disk).join("serial"), serial).unwrap();
            fs::write(
                sysfs.path().join(disk).join(format!("{disk}2/partition")),
                "2\n",
            )
            .unwrap();
        }
        fs::create_dir_all(sysfs.path().join("loop0")).unwrap();
        assert_eq!(
            find(sysfs.path(), "data", None).unwrap().as_deref(),
            Some("vdb")
        );
        assert_eq!(
            find(sysfs.path(), "root", Some(2)).unwrap().as_deref(),
            Some("vda2")
        );
        assert_eq!(find(sysfs.path(), "root", Some(1)).unwrap(), None);
        assert_eq!(find(sysfs.path(), "roo", None).unwrap(), None);
        assert_eq!(
            find(&sysfs.path().join("none"), "root", None).unwrap(),
            None
        );
    }
}
