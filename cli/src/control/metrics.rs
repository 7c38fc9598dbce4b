//! A machine's counters as Prometheus text, for whoever asks at the control socket over HTTP.

use std::fmt::{self, Write as _};
use std::io::{self, Read, Write};

use super::Owner;
use super::protocol::{Inspection, Stats};

/// The longest head of an HTTP request, without the `GET ` that was read already.
const MAX_HEAD: usize = 8 << 10;

/// Answers a request of HTTP whose `GET ` was read already; the connection ends with that.
pub fn answer(mut stream: impl Read + Write, owner: &impl Owner) -> io::Result<()> {
    let head = read_head(&mut stream)?;
    let path = head.split(|&byte| byte == b' ' || byte == b'\r').next();
    let (status, body) = match path {
        Some(b"/metrics") => match owner.stats() {
            Ok(stats) => ("200 OK", text(&owner.inspect(), &stats)),
            Err(error) => ("503 Service Unavailable", format!("{error}\n")),
        },
        _ => ("404 Not Found", "there is only /metrics here\n".to_owned()),
    };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let len = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes())?;
    stream.flush()
}

fn read_head(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut buffer = [0u8; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() >= MAX_HEAD {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the head of an HTTP request is too long",
            ));
        }
        match from.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => head.extend_from_slice(buffer.get(..len).unwrap_or_default()),
        }
    }
    Ok(head)
}

/// All of a machine's counters, in the text format of Prometheus.
pub fn text(machine: &Inspection, stats: &Stats) -> String {
    let mut page = Page {
        text: String::new(),
        machine: machine.name.to_string(),
    };
    processor_and_memory(&mut page, stats);
    disks(&mut page, stats);
    nets(&mut page, stats);
    connections(&mut page, stats);
    page.text
}

fn processor_and_memory(page: &mut Page, stats: &Stats) {
    page.one("cpus", "gauge", "Virtual CPUs.", f64::from(stats.cpus));
    let seconds = stats.cpu_ns as f64 / 1e9;
    page.one(
        "cpu_seconds_total",
        "counter",
        "Time that the virtual CPUs ran.",
        seconds,
    );
    page.one(
        "memory_bytes",
        "gauge",
        "Memory the guest may use.",
        stats.memory as f64,
    );
    let resident = stats.memory_resident as f64;
    page.one(
        "memory_resident_bytes",
        "gauge",
        "Memory the host has given.",
        resident,
    );
}

fn disks(page: &mut Page, stats: &Stats) {
    let disks = || stats.disks.iter();
    let disk = |help: &'static str| (help, "disk");
    page.many(
        "disk_reads_total",
        disk("Read requests."),
        disks().map(|d| (&d.name, d.reads)),
    );
    page.many(
        "disk_writes_total",
        disk("Write requests."),
        disks().map(|d| (&d.name, d.writes)),
    );
    let read = disks().map(|d| (&d.name, d.read_bytes));
    page.many("disk_read_bytes_total", disk("Bytes read."), read);
    let written = disks().map(|d| (&d.name, d.written_bytes));
    page.many("disk_written_bytes_total", disk("Bytes written."), written);
}

fn nets(page: &mut Page, stats: &Stats) {
    let nets = || stats.nets.iter();
    let net = |help: &'static str| (help, "interface");
    let received = nets().map(|n| (&n.name, n.received_bytes));
    page.many(
        "net_received_bytes_total",
        net("Bytes received by the guest."),
        received,
    );
    let received = nets().map(|n| (&n.name, n.received_packets));
    page.many(
        "net_received_packets_total",
        net("Frames received by the guest."),
        received,
    );
    let sent = nets().map(|n| (&n.name, n.sent_bytes));
    page.many(
        "net_sent_bytes_total",
        net("Bytes sent by the guest."),
        sent,
    );
    let sent = nets().map(|n| (&n.name, n.sent_packets));
    page.many(
        "net_sent_packets_total",
        net("Frames sent by the guest."),
        sent,
    );
}

fn connections(page: &mut Page, stats: &Stats) {
    let vsock = &stats.vsock;
    let connections = vsock.connections as f64;
    page.one(
        "vsock_connections",
        "gauge",
        "Open vsock connections.",
        connections,
    );
    let received = vsock.received_bytes as f64;
    page.one(
        "vsock_received_bytes_total",
        "counter",
        "Bytes the guest received over vsock.",
        received,
    );
    let sent = vsock.sent_bytes as f64;
    page.one(
        "vsock_sent_bytes_total",
        "counter",
        "Bytes the guest sent over vsock.",
        sent,
    );
    let all = stats.forwarded_total as f64;
    page.one(
        "forwarded_connections_total",
        "counter",
        "Forwarded connections so far.",
        all,
    );
}

struct Page {
    text: String,
    machine: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP mvm_{name} {help}"));
        self.line(format_args!("# TYPE mvm_{name} {kind}"));
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        let machine = escaped(&self.machine);
        self.line(format_args!("mvm_{name}{{machine=\"{machine}\"}} {value}"));
    }

    fn many<'a>(
        &mut self,
        name: &str,
        (help, label): (&str, &str),
        values: impl Iterator<Item = (&'a String, u64)>,
    ) {
        let mut values = values.peekable();
        if values.peek().is_none() {
            return;
        }
        self.head(name, "counter", help);
        let machine = escaped(&self.machine);
        for (of, value) in values {
            let of = escaped(of);
            self.line(format_args!(
                "mvm_{name}{{machine=\"{machine}\",{label}=\"{of}\"}} {value}"
            ));
        }
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{line}");
    }
}

/// The value of a label, as the format wants it.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
