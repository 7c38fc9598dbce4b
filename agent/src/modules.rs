//! Kernel modules: loaded in the order that the host worked out.

use std::fs::{self, File};

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::system::finit_module;

/// Loads each module and removes its file, whose memory is the machine's.
pub fn load(paths: &[String]) -> Result<()> {
    for path in paths {
        let file = File::open(path)
            .with_context(|| format!("the kernel module {path} is not in the initramfs"))?;
        match finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                let hint = "it has to come from the very build of this kernel";
                return Err(error)
                    .with_context(|| format!("the kernel refuses the module {path} ({hint})"));
            }
        }
        drop(file);
        fs::remove_file(path).with_context(|| format!("{path} cannot be removed after loading"))?;
    }
    Ok(())
}
