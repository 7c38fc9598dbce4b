//! What `mvm run` shares with a machine, and `mvm mount` changes.

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Subcommand};

use super::Format;
use crate::folder::spec::{self, Volume};
use crate::store::Name;

/// Folders of the host.
#[derive(Debug, Clone, Args)]
pub struct FolderArgs {
    /// Share a folder or a file of the host; options: ro, uid=N, gid=N, cache=auto|strict|private, locks=host
    #[arg(
        short,
        long,
        value_name = "HOST:GUEST[:OPTIONS]",
        // Without a value it says what it wants.
        num_args = 0..=1,
        default_missing_value = "",
        action = clap::ArgAction::Append,
        value_parser = OsStringValueParser::new().try_map(|text| Volume::parse(&text)),
        conflicts_with_all = ["initrd", "console"],
    )]
    pub volume: Vec<Volume>,
}

/// `mvm mount`.
#[derive(Debug, Subcommand)]
pub enum MountCommand {
    /// Share more folders
    Add {
        /// The machine
        name: Name,
        /// Folders or files, as for `mvm run -v`
        #[arg(
            required = true,
            value_name = "HOST:GUEST[:OPTIONS]",
            value_parser = OsStringValueParser::new().try_map(|text| Volume::parse(&text)),
        )]
        folders: Vec<Volume>,
    },
    /// Share folders no longer
    Rm {
        /// Take them away from programs that use them, too
        #[arg(short, long)]
        force: bool,
        /// The machine
        name: Name,
        /// Where the machine has them
        #[arg(
            required = true,
            value_name = "GUEST",
            value_parser = OsStringValueParser::new().try_map(|text| spec::guest_path(&text)),
        )]
        folders: Vec<std::path::PathBuf>,
    },
    /// List what is shared
    Ls {
        /// The machine
        name: Name,
        /// How to print the list
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
}
