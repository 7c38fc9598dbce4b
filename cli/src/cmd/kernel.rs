//! `mvm kernel`: the kernels that machines boot.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use kernels::cache::{Cache, Source};
use kernels::fetch::{self, Kind};
use kernels::progress::Stderr;
use kernels::select::{self, Places, Role};
use kernels::{add, build, check};
use serde::Serialize;

use crate::args::{Format, KernelCommand, Purpose};
use crate::prepare::consent;

/// Runs one of the verbs.
pub fn run(command: KernelCommand) -> Result<ExitCode> {
    let cache = Cache::open()?;
    let progress = Stderr::new();
    match command {
        KernelCommand::Ls { format } => return list(&cache, format),
        KernelCommand::Fetch { package, yes } => {
            let kind = match package.as_str() {
                "cloud" => Kind::Cloud,
                "generic" => Kind::Generic,
                _ => Kind::Package(package),
            };
            let kernel = fetch::fetch(&cache, &kind, consent(yes), &progress)?;
            println!("{}", kernel.id);
        }
        KernelCommand::Build { yes, jobs } => {
            let options = build::Options {
                jobs,
                ..Default::default()
            };
            let kernel = build::build(&cache, &options, consent(yes), &progress)?;
            println!("{}", kernel.id);
        }
        KernelCommand::Add { file, modules } => {
            println!("{}", add::add(&cache, &file, modules.as_deref())?.id);
        }
        KernelCommand::Use { kernel } => prefer(&cache, kernel.as_deref())?,
        KernelCommand::Rm { names } => {
            for name in names {
                println!("{}", cache.remove(&name)?);
            }
        }
        KernelCommand::Check {
            file,
            purpose,
            format,
        } => return check_file(&file, &purpose, format),
    }
    Ok(ExitCode::SUCCESS)
}

/// Sets what is booted where no kernel is named, once it is known to be one.
fn prefer(cache: &Cache, kernel: Option<&Path>) -> Result<()> {
    let places = Places::of_user()?;
    let Some(kernel) = kernel else {
        return Ok(places.preference.set(None)?);
    };
    select::select(cache, &places, Some(kernel), Role::Machine)?;
    // A file has to be found from any directory, a name of the cache has none.
    let setting = match kernel.is_file() {
        true => kernel.canonicalize()?,
        false => kernel.to_owned(),
    };
    let setting = setting
        .to_str()
        .context("the kernel's path is not UTF-8: rename it")?;
    Ok(places.preference.set(Some(setting))?)
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    source: &'static str,
    package: Option<String>,
    bytes: u64,
    modules: bool,
}

fn list(cache: &Cache, format: Format) -> Result<ExitCode> {
    let mut rows = Vec::new();
    for kernel in cache.kernels()? {
        rows.push(Row {
            source: match kernel.metadata.source {
                Source::Fetched => "fetched",
                Source::Built => "built",
                Source::Added => "added",
            },
            package: kernel.metadata.package.clone(),
            bytes: kernel.size()?,
            modules: kernel.modules().is_some(),
            name: kernel.id,
        });
    }
    // Those that were built are taken before those that were fetched, the newest of each first.
    rows.sort_by_key(|row| row.source != "built");
    match format {
        Format::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
        Format::Table => {
            println!("{:<44} {:<8} {:>9}  PACKAGE", "NAME", "SOURCE", "SIZE");
            for row in rows {
                println!(
                    "{:<44} {:<8} {:>5} MiB  {}",
                    row.name,
                    row.source,
                    row.bytes >> 20,
                    row.package.as_deref().unwrap_or("-")
                );
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Serialize)]
struct Lack {
    purpose: &'static str,
    option: &'static str,
    needed_for: &'static str,
    required: bool,
}

/// The exit code is 1 where something is missing without which the purpose fails.
fn check_file(file: &Path, purposes: &[Purpose], format: Format) -> Result<ExitCode> {
    let purposes: Vec<_> = match purposes {
        [] => check::Purpose::ALL.to_vec(),
        some => some
            .iter()
            .map(|purpose| match purpose {
                Purpose::Boot => check::Purpose::Boot,
                Purpose::Share => check::Purpose::Share,
                Purpose::Docker => check::Purpose::Docker,
            })
            .collect(),
    };
    let mut lacks = Vec::new();
    for purpose in purposes {
        for missing in check::check(file, purpose)? {
            lacks.push(Lack {
                purpose: purpose.name(),
                option: missing.option,
                needed_for: missing.needed_for,
                required: missing.is_required,
            });
        }
    }
    match format {
        Format::Json => println!("{}", serde_json::to_string_pretty(&lacks)?),
        Format::Table if lacks.is_empty() => println!("nothing is missing"),
        Format::Table => {
            for lack in &lacks {
                let weight = if lack.required { "missing" } else { "optional" };
                println!(
                    "{:<7} {:<9} CONFIG_{:<28} {}",
                    lack.purpose, weight, lack.option, lack.needed_for
                );
            }
        }
    }
    Ok(match lacks.iter().any(|lack| lack.required) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}
