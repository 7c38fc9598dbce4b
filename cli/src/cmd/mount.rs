//! `mvm mount`: what of the host is shared with a machine that runs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;

use crate::args::Format;
use crate::args::folder::MountCommand;
use crate::control::client::Client;
use crate::control::protocol::{Answer, Mount, Op};
use crate::store::{Name, Store};
use crate::table::{self, Table};

/// Runs one of the verbs.
pub fn run(command: MountCommand) -> Result<ExitCode> {
    match command {
        MountCommand::Add { name, folders } => {
            // With paths made absolute: the owner has another working directory.
            let mounts = folders.iter().map(|folder| folder.text().into()).collect();
            mounts_of(&name, Op::MountAdd { mounts })?;
        }
        MountCommand::Rm {
            name,
            folders,
            force,
        } => {
            let guest = folders
                .into_iter()
                .map(|folder| folder.into_os_string().into())
                .collect();
            mounts_of(&name, Op::MountRm { guest, force })?;
        }
        MountCommand::Ls { name, format } => {
            let mounts = mounts_of(&name, Op::MountLs)?;
            match format {
                Format::Json => table::print_json(&mounts)?,
                Format::Table => table::print(&listed(&mounts).text())?,
            };
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn mounts_of(name: &Name, op: Op) -> Result<Vec<Mount>> {
    let mut client = Client::connect(&Store::open()?, name)?;
    match client.ask(op)? {
        Answer::Mounts(mounts) => Ok(mounts),
        answer => Err(client.unexpected(&answer)),
    }
}

fn listed(mounts: &[Mount]) -> Table {
    let mut table = Table::new(&["HOST", "GUEST", "ACCESS", "OWNER", "CACHE", "LOCKS"]);
    for mount in mounts {
        table.row(vec![
            mount.host.to_string(),
            mount.guest.to_string(),
            access(mount).to_owned(),
            format!("{}:{}", mount.uid, mount.gid),
            mount.cache.clone(),
            mount.locks.clone(),
        ]);
    }
    table
}

/// One folder in a line, for people.
pub fn shown(mount: &Mount) -> String {
    let only = if mount.read_only { " (read-only)" } else { "" };
    format!("{} -> {}{only}", mount.host, mount.guest)
}

fn access(mount: &Mount) -> &'static str {
    if mount.read_only { "ro" } else { "rw" }
}

/// Where the guest has `dir` of this host, which has no symbolic links in it.
pub fn in_guest(mounts: &[Mount], dir: &Path) -> Option<PathBuf> {
    let found = mounts.iter().filter_map(|mount| {
        // The owner looked it up where this process is, too.
        let host = std::fs::canonicalize(mount.host.as_os_str()).ok()?;
        let rest = dir.strip_prefix(&host).ok()?;
        let guest = Path::new(mount.guest.as_os_str());
        // Joining nothing would leave a slash at the end.
        let inside = match rest.as_os_str().is_empty() {
            true => guest.to_owned(),
            false => guest.join(rest),
        };
        Some((host.components().count(), inside))
    });
    // The nearest one: another may be inside of it on the host.
    let nearest = found.max_by_key(|(depth, _)| *depth);
    nearest.map(|(_, inside)| inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(host: &Path, guest: &str) -> Mount {
        Mount {
            host: host.as_os_str().to_owned().into(),
            guest: guest.into(),
            read_only: false,
            uid: 0,
            gid: 0,
            cache: "auto".to_owned(),
            locks: "guest".to_owned(),
        }
    }

    #[test]
    fn a_directory_is_found_through_the_nearest_folder() {
        let dir = tempfile::tempdir().unwrap();
        let outer = dir.path().canonicalize().unwrap();
        let inner = outer.join("inner");
        std::fs::create_dir_all(inner.join("deep")).unwrap();
        std::os::unix::fs::symlink(&inner, outer.join("link")).unwrap();
        let mounts = [
            mount(&inner, "/inner"),
            mount(&outer, "/outer"),
            mount(&outer.join("gone"), "/gone"),
        ];
        let found = |dir: &Path| in_guest(&mounts, dir);
        assert_eq!(found(&outer), Some("/outer".into()));
        assert_eq!(found(&outer.join("other/a")), Some("/outer/other/a".into()));
        assert_eq!(found(&inner.join("deep")), Some("/inner/deep".into()));
        assert_eq!(found(Path::new("/")), None);
        let linked = [mount(&outer.join("link"), "/linked")];
        assert_eq!(
            in_guest(&linked, &inner.join("deep")),
            Some("/linked/deep".into())
        );
    }
}
