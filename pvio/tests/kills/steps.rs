//! The process of a disk is stopped by `ptrace` after a system call or an instruction, and killed there.
//!
//! The process is confined and not dumpable. A tracer needs `CAP_SYS_PTRACE` in the user namespace of
//! the process, which root of the host has. The process's own filter of system calls stays in force:
//! a stop by `ptrace` precedes it.

use crate::machine::{Check, KINDS, Pauses, Random, Victim, print};
use crate::places::{Places, Step};
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Duration of the workload of the short form and of a round of the long form, in seconds.
const SHORT: u64 = 6;
const LONG: u64 = 16;
/// Time at the end of a round in which nothing is killed, in seconds.
const LAST: u64 = 2;
/// The supervisor replaces a burst of 60 processes, then one per second.
const BURST: u64 = 55;
/// Kills of a round.
const SHORT_KILLS: usize = 12;
const LONG_KILLS: usize = 68;
/// Number of system calls of a poll after which a process is killed. A poll makes fewer.
const SYSTEM_CALLS: usize = 16;
/// Number of polls in a row without an instruction that was not killed at, after which all were.
const ALL: usize = 12;
/// Most instructions that are stepped at a time, and number of times until a step is found.
const INSTRUCTIONS: usize = 20_000;
const ATTEMPTS: usize = 20;
/// How long a thread may take to arrive at an instruction that it executed before.
const ARRIVAL: Duration = Duration::from_millis(300);

/// Why a thread is not traced any longer.
enum Ended {
    /// The process was killed at this time.
    Killed(SystemTime),
    /// The poll ended first.
    Passed,
}

/// The traced thread of a queue.
struct Traced {
    process: Pid,
    thread: Pid,
    /// Address of the program in memory.
    base: u64,
}

impl Traced {
    /// Stops the thread of the first queue.
    fn stop(process: u64) -> nix::Result<Self> {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).map_err(|_| nix::Error::ESRCH)?;
        let is_queue = |task: &std::path::PathBuf| {
            let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
            name.starts_with("vbd-") && !name.contains("pvio:")
        };
        let task = tasks.flatten().map(|task| task.path()).find(is_queue);
        let task = task.ok_or(nix::Error::ESRCH)?;
        let number = |text: &str| Pid::from_raw(text.parse().unwrap());
        let thread = number(&task.file_name().unwrap().to_string_lossy());
        let process = number(&process.to_string());
        ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD)?;
        ptrace::interrupt(thread)?;
        waitpid(thread, Some(WaitPidFlag::__WALL))?;
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
        let base = maps.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
        Ok(Self { process, thread, base: base.ok_or(nix::Error::ESRCH)? })
    }

    fn wait(&self) -> nix::Result<WaitStatus> {
        waitpid(self.thread, Some(WaitPidFlag::__WALL))
    }

    /// Continues until the next return from a system call. Returns its name.
    fn system_call(&self) -> nix::Result<String> {
        let mut entered = false;
        loop {
            ptrace::syscall(self.thread, None)?;
            match self.wait()? {
                WaitStatus::PtraceSyscall(_) => {
                    let registers = ptrace::getregs(self.thread)?;
                    // At the entry, the result is preset to "not implemented".
                    let enters = registers.rax as i64 == -i64::from(libc::ENOSYS);
                    if entered && !enters {
                        return Ok(name(&registers));
                    }
                    entered = enters;
                }
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    return Err(nix::Error::ESRCH);
                }
                _ => {}
            }
        }
    }

    /// Continues until the thread has returned from a wait: the begin of a poll.
    fn begin_poll(&self) -> nix::Result<()> {
        while self.system_call()? != WAIT {}
        Ok(())
    }

    /// Continues until the thread executes an instruction, by a debug register. Returns whether it did
    /// so in time.
    fn arrive(&self, address: u64) -> nix::Result<bool> {
        let register = |n: usize| {
            let offset =
                std::mem::offset_of!(libc::user, u_debugreg) + n * size_of::<libc::c_long>();
            std::ptr::without_provenance_mut(offset)
        };
        let address = self.base.wrapping_add(address).cast_signed();
        ptrace::write_user(self.thread, register(0), address)?;
        // Register 7: the address in register 0 stops execution.
        ptrace::write_user(self.thread, register(7), 1)?;
        ptrace::cont(self.thread, None)?;
        let begin = Instant::now();
        let arrived = loop {
            match waitpid(self.thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive if begin.elapsed() > ARRIVAL => {
                    ptrace::interrupt(self.thread)?;
                    break matches!(self.wait()?, WaitStatus::Stopped(_, Signal::SIGTRAP));
                }
                WaitStatus::StillAlive => sleep(Duration::from_micros(100)),
                WaitStatus::Stopped(_, Signal::SIGTRAP) => break true,
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    return Err(nix::Error::ESRCH);
                }
                _ => ptrace::cont(self.thread, None)?,
            }
        };
        ptrace::write_user(self.thread, register(7), 0)?;
        Ok(arrived)
    }

    /// Kills the process where the thread is.
    fn kill(&self) -> nix::Result<Ended> {
        let now = SystemTime::now();
        kill(self.process, Signal::SIGKILL)?;
        // The process does not end before its tracer has taken the end of the thread.
        while !matches!(self.wait()?, WaitStatus::Exited(..) | WaitStatus::Signaled(..)) {}
        Ok(Ended::Killed(now))
    }

    fn leave(&self) -> nix::Result<Ended> {
        ptrace::detach(self.thread, None)?;
        Ok(Ended::Passed)
    }
}

/// The wait of a worker.
const WAIT: &str = "io_uring_enter(wait)";

/// Returns the name of the system call that has returned.
fn name(registers: &libc::user_regs_struct) -> String {
    match registers.orig_rax as i64 {
        libc::SYS_io_uring_enter if registers.rdx > 0 => WAIT.into(),
        libc::SYS_io_uring_enter => "io_uring_enter(submit)".into(),
        libc::SYS_read => "read".into(),
        libc::SYS_write => "write".into(),
        libc::SYS_futex => "futex".into(),
        other => format!("system call {other}"),
    }
}

/// Where processes were killed.
#[derive(Default)]
struct Killed {
    /// After system calls, by their number in a poll and name.
    system_calls: BTreeMap<(usize, String), usize>,
    /// For each kind of disk: the number of system calls after which the next process is killed, and
    /// of polls in a row that had fewer.
    calls: [(usize, usize); KINDS.len()],
    /// The kind of disk.
    kind: usize,
    /// At instructions, by their addresses in the program.
    instructions: HashSet<u64>,
    steps: BTreeMap<Step, usize>,
    /// The first instruction of each step, once it is known.
    begins: BTreeMap<Step, u64>,
    /// Times in a row that a step was passed whose instructions had all been killed at.
    passed: usize,
    /// Kills at every how many new instructions; 1 is each.
    stride: u64,
}

impl Killed {
    fn has_all_system_calls(&self, kind: usize) -> bool {
        let (next, shorter) = self.calls[kind];
        next > SYSTEM_CALLS || shorter >= 5
    }

    fn has_all(&self) -> bool {
        (0..KINDS.len()).all(|kind| self.has_all_system_calls(kind)) && self.passed >= ALL
    }

    /// Kills after the next system call of a poll that was not killed at.
    fn after_system_call(&mut self, traced: &Traced) -> nix::Result<Ended> {
        traced.begin_poll()?;
        let number = self.calls[self.kind].0.max(1);
        for n in 1..=number {
            let name = traced.system_call()?;
            if n == number {
                *self.system_calls.entry((n, name)).or_default() += 1;
                self.calls[self.kind] = (number + 1, 0);
                return traced.kill();
            }
            if name == WAIT {
                self.calls[self.kind].1 += 1;
                return traced.leave();
            }
        }
        traced.leave()
    }

    /// Kills before the next instruction between a completion and the notification that was not
    /// killed at.
    fn at_instruction(
        &mut self,
        traced: &Traced,
        places: &mut Places,
        random: &mut Random,
    ) -> nix::Result<Ended> {
        // The completions of a poll and their publication, in turn.
        let begins = [Step::Complete, Step::Publish].map(|step| self.begins.get(&step).copied());
        if let [Some(complete), Some(publish)] = begins {
            let begin = if self.passed.is_multiple_of(2) { complete } else { publish };
            if traced.arrive(begin)?
                && let Some(ended) = self.in_poll(traced, places, random)?
            {
                return Ok(ended);
            }
            self.passed += 1;
            return traced.leave();
        }
        for _ in 0..ATTEMPTS {
            while !traced.system_call()?.starts_with("io_uring_enter") {}
            if let Some(ended) = self.in_poll(traced, places, random)? {
                return Ok(ended);
            }
        }
        traced.leave()
    }

    /// The same from where the thread is. Returns `None` if it passes no step.
    fn in_poll(
        &mut self,
        traced: &Traced,
        places: &mut Places,
        random: &mut Random,
    ) -> nix::Result<Option<Ended>> {
        let mut skip = random.below(self.stride);
        // The step, and its stack pointer: functions that it calls have lower ones.
        let mut within = None::<(Step, u64)>;
        let (mut seen, mut is_first) = (false, true);
        for _ in 0..INSTRUCTIONS {
            let registers = ptrace::getregs(traced.thread)?;
            // The thread returns from the next submission or wait.
            let returns = registers.orig_rax == libc::SYS_io_uring_enter.cast_unsigned()
                && !std::mem::take(&mut is_first);
            let address = registers.rip.wrapping_sub(traced.base);
            let own = places.step(address);
            if let Some(step) = own {
                self.begins.entry(step).or_insert(address);
            }
            within = match (own, within) {
                (Some(step), _) => Some((step, registers.rsp)),
                (None, Some((Step::Notify, above))) if registers.rsp >= above => break,
                (None, Some((step, above))) if registers.rsp < above => Some((step, above)),
                (None, _) => None,
            };
            if returns && within.is_none() {
                break;
            }
            if let Some((step, _)) = within {
                seen = true;
                if !self.instructions.contains(&address) {
                    if skip == 0 {
                        self.instructions.insert(address);
                        *self.steps.entry(step).or_default() += 1;
                        self.passed = 0;
                        return traced.kill().map(Some);
                    }
                    skip -= 1;
                }
            }
            ptrace::step(traced.thread, None)?;
            match traced.wait()? {
                WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => {}
                _ => return Err(nix::Error::ESRCH),
            }
        }
        if !seen {
            return Ok(None);
        }
        self.passed += 1;
        traced.leave().map(Some)
    }

    /// Kills the process of a disk again and again. Returns the kills.
    fn round(
        &mut self,
        check: &mut Check,
        places: &mut Places,
        random: &mut Random,
        (most, until): (usize, Instant),
    ) -> Vec<(Victim, SystemTime)> {
        let mut kills: Vec<(Victim, SystemTime)> = Vec::new();
        let begin = Instant::now();
        while kills.len() < most && Instant::now() < until && !self.has_all() {
            if kills.len() as u64 >= BURST + begin.elapsed().as_secs() {
                sleep(Duration::from_millis(50));
                continue;
            }
            let (_, device) = check.wait_for_processes();
            let traced = match Traced::stop(device) {
                Ok(traced) => traced,
                // The process has just started, or ended.
                Err(nix::Error::ESRCH) => continue,
                Err(error) => panic!("ptrace: {error}"),
            };
            let calls = !self.has_all_system_calls(self.kind) && kills.len().is_multiple_of(2);
            let ended = if calls {
                self.after_system_call(&traced)
            } else {
                self.at_instruction(&traced, places, random)
            };
            match ended {
                Ok(Ended::Killed(at)) => {
                    kills.push((Victim::Device, at));
                    check.wait_until_served(kills[kills.len() - 1]);
                }
                Ok(Ended::Passed) => {}
                Err(error) => panic!("the process ended unexpectedly: {error}"),
            }
        }
        kills
    }
}

/// Returns whether this process may trace a process of another user.
fn may_trace() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    const CAP_SYS_PTRACE: u32 = 19;
    effective.is_some_and(|set| set & (1 << CAP_SYS_PTRACE) != 0)
}

#[test]
fn session_goes_on_after_each_system_call_and_instruction() {
    if !may_trace() {
        eprintln!(
            "SKIPPED: a confined process can be traced with CAP_SYS_PTRACE only; run as root"
        );
        return;
    }
    let long = std::env::var_os("PVIO_KILL_ROUNDS").is_some();
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {seed}");
    let (mut random, mut places) = (Random(seed.into()), Places::of(env!("CARGO_BIN_EXE_pvio")));
    let stride = if long { 1 } else { 16 };
    let mut killed = Killed { stride, ..Killed::default() };
    let (mut count, mut all) = (0, Pauses::new());
    let first = usize::try_from(random.below(KINDS.len() as u64)).unwrap();
    // On a busy machine, a round of the short form may be too short.
    let (seconds, most, rounds) =
        if long { (LONG, LONG_KILLS, usize::MAX) } else { (SHORT, SHORT_KILLS, 5) };
    for round in (first..).take(rounds) {
        let dir = tempfile::tempdir().unwrap();
        killed.kind = round % KINDS.len();
        let (kind, seed) = (KINDS[killed.kind], 1 + random.below(1 << 32));
        let Some(mut check) = Check::start(dir.path(), kind, seed, seconds) else { continue };
        let until = Instant::now() + Duration::from_secs(seconds - LAST);
        let kills = killed.round(&mut check, &mut places, &mut random, (most, until));
        count += kills.len();
        all.extend(check.finish(&kills));
        let has_some = !killed.system_calls.is_empty() && !killed.steps.is_empty();
        if killed.has_all() || (!long && has_some) {
            break;
        }
    }
    println!(
        "{count} kills after system calls {:?} and at {} instructions {:?}",
        killed.system_calls,
        killed.instructions.len(),
        killed.steps
    );
    print(&all);
    assert!(!killed.system_calls.is_empty() && !killed.steps.is_empty(), "nothing was killed");
}
