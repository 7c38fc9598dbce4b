//! How machines are: what is on disk and what their owners say, put together.

use std::ffi::OsString;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::control::client::Client;
use crate::control::protocol::{Answer, Inspection, Op, State};
use crate::store::{Definition, Ending, Entry, Name, Owner, Standing, Store};

/// How long an owner may take to say how its machine is.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Its guest is not up yet.
    Starting,
    /// It runs.
    Running,
    /// Its CPUs stand still.
    Paused,
    /// It was asked to end.
    Stopping,
    /// Its owner lives and does not answer.
    Unresponsive,
    /// It ended with an exit code.
    Exited,
    /// It could not go on.
    Failed,
    /// Its owner was killed.
    Dead,
    /// What is on disk makes no sense.
    Damaged,
}

impl Status {
    /// As it is shown.
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Unresponsive => "unresponsive",
            Self::Exited => "exited",
            Self::Failed => "failed",
            Self::Dead => "dead",
            Self::Damaged => "damaged",
        }
    }
}

/// All that is known of a machine.
#[derive(Debug, Serialize)]
pub struct Survey {
    /// Its name.
    pub name: Name,
    /// How it is.
    pub status: Status,
    /// Why that is not known better; one sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// What it is made from.
    pub definition: Option<Definition>,
    /// How it last ended, where it does not run.
    pub ending: Option<Ending>,
    /// Who owns it.
    pub owner: Option<Owner>,
    /// What its owner says of it.
    pub machine: Option<Inspection>,
}

impl Survey {
    /// That of one machine, which has to exist.
    pub fn one(store: &Store, name: &Name) -> Result<Self> {
        store.check_exists(name)?;
        let entry = Entry {
            name: name.clone(),
            definition: store.definition(name),
            standing: store.standing(name),
        };
        Ok(Self::of(store, entry))
    }

    /// Those of all machines, in the order of their names. One that does not answer holds up no other.
    pub fn all(store: &Store) -> Result<Vec<Self>> {
        let entries = store.list()?;
        Ok(thread::scope(|scope| {
            let surveys: Vec<_> = entries
                .into_iter()
                .map(|entry| match entry.standing {
                    Ok(Standing::Owned) => Err(scope.spawn(|| Self::of(store, entry))),
                    _ => Ok(Self::of(store, entry)),
                })
                .collect();
            surveys
                .into_iter()
                .filter_map(|survey| match survey {
                    Ok(survey) => Some(survey),
                    // None only where the thread panicked, which it has told of.
                    Err(asking) => asking.join().ok(),
                })
                .collect()
        }))
    }

    fn of(store: &Store, entry: Entry) -> Self {
        let mut survey = Self {
            name: entry.name,
            status: Status::Damaged,
            trouble: None,
            definition: None,
            ending: None,
            owner: None,
            machine: None,
        };
        match entry.standing {
            Ok(Standing::Owned) => survey.ask(store),
            Ok(Standing::Killed) => survey.status = Status::Dead,
            Ok(Standing::Ended(ending)) => survey.end(ending),
            Err(error) => survey.trouble = Some(format!("{error:#}")),
        }
        match entry.definition {
            Ok(definition) => survey.definition = Some(definition),
            Err(error) => {
                // What runs is shown as running all the same.
                if survey.machine.is_none() {
                    survey.status = Status::Damaged;
                }
                survey.trouble = Some(format!("{error:#}"));
            }
        }
        survey
    }

    fn end(&mut self, ending: Ending) {
        self.status = match ending.error {
            Some(_) => Status::Failed,
            None => Status::Exited,
        };
        self.ending = Some(ending);
    }

    /// Asks the machine's owner.
    fn ask(&mut self, store: &Store) {
        self.owner = store.owner(&self.name).ok().flatten();
        let asked = Client::connect_within(store, &self.name, PATIENCE)
            .and_then(|mut client| client.ask(Op::Inspect));
        match asked {
            Ok(Answer::Inspection(machine)) => {
                self.status = match machine.state {
                    State::Starting => Status::Starting,
                    State::Running => Status::Running,
                    State::Paused => Status::Paused,
                    State::Stopping => Status::Stopping,
                    State::Other => Status::Unresponsive,
                };
                self.machine = Some(*machine);
            }
            // It may have ended while it was asked.
            other => match store.standing(&self.name) {
                Ok(Standing::Ended(ending)) => self.end(ending),
                Ok(Standing::Killed) => self.status = Status::Dead,
                // It begins to listen when it is made, and has not said who it is before.
                _ if self.owner.is_none() => self.status = Status::Starting,
                _ => {
                    self.status = Status::Unresponsive;
                    self.trouble = other.err().map(|error| format!("{error:#}"));
                }
            },
        }
    }

    /// Whether a process owns it.
    pub fn is_owned(&self) -> bool {
        matches!(
            self.status,
            Status::Starting
                | Status::Running
                | Status::Paused
                | Status::Stopping
                | Status::Unresponsive
        )
    }

    /// The command as it was typed; empty is a shell, or a machine that just runs.
    pub fn command(&self) -> Vec<OsString> {
        if let Some(machine) = &self.machine {
            let words = machine.command.iter();
            return words.map(|word| word.as_os_str().to_owned()).collect();
        }
        let typed = self.definition.iter().flat_map(|made| &made.argv);
        typed
            .map(|word| word.as_os_str().to_owned())
            .skip_while(|word| word != "--")
            .skip(1)
            .collect()
    }
}
