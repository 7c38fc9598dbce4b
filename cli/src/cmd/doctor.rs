//! `mvm doctor`: what this host offers to machines, and how to mend what is missing.

use std::process::ExitCode;

use anyhow::Result;
use kernels::cache::Cache;
use serde::Serialize;
use vmm::probe::{self, Check, Status, host};

use crate::args::{DoctorArgs, Format};

/// One row.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    status: &'static str,
    detail: String,
    mend: Option<String>,
}

impl Finding {
    fn new(name: &'static str, check: Check) -> Self {
        Self {
            name,
            status: match check.status {
                Status::Ok => "ok",
                Status::Slow => "slow",
                Status::Missing => "missing",
            },
            detail: check.detail,
            mend: check.mend,
        }
    }
}

/// Prints the findings; the exit code is 0 where machines can run, by KVM or by emulation, else 1.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let findings = [
        Finding::new("kvm", probe::kvm().into()),
        Finding::new("qemu", host::qemu()),
        kernels(),
        Finding::new("tap", host::tap()),
        Finding::new("io_uring", host::io_uring()),
        Finding::new("landlock", host::landlock()),
        Finding::new("user namespaces", host::user_namespaces()),
        Finding::new("memory", host::memory()),
    ];
    match args.format {
        Format::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
        Format::Table => {
            for finding in &findings {
                println!(
                    "{:<16} {:<8} {}",
                    finding.name, finding.status, finding.detail
                );
                if let Some(mend) = &finding.mend {
                    println!("{:<25} → {mend}", "");
                }
            }
        }
    }
    let runs = findings[..2]
        .iter()
        .any(|finding| finding.status != "missing");
    Ok(if runs {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn kernels() -> Finding {
    let found = Cache::open().and_then(|cache| cache.kernels());
    let (status, detail, mend) = match found {
        Ok(kernels) if kernels.is_empty() => (
            "missing",
            "there is no kernel in the cache".to_owned(),
            Some("mvm fetches one when it first runs a machine; or: mvm kernel fetch".to_owned()),
        ),
        Ok(kernels) => {
            let names: Vec<_> = kernels.iter().map(|kernel| kernel.id.as_str()).collect();
            ("ok", names.join(", "), None)
        }
        Err(error) => ("missing", error.to_string(), None),
    };
    Finding {
        name: "kernels",
        status,
        detail,
        mend,
    }
}
