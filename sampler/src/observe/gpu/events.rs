//! XID errors from the driver. Errors in quick succession are passed on together: a failing GPU reports thousands.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use sampler_core::observation::Observation;

use super::context::Context;
use super::library::{Generation, Listen};
use super::nvml_caller::{DeviceFault, fault, is_unsupported};
use super::xids::Xids;
use crate::health::call_watchdog::Caller;
use crate::health::condition::Condition;
use crate::health::nvml_calls::Call;
use crate::inbox::Closed;
use crate::observe::clock::boot_now;

/// Maximum duration of one wait: new devices are registered after it, and the library is closed within a second of a release.
const WAIT: Duration = Duration::from_millis(250);
/// Errors within this time are reported together.
const TOGETHER: Duration = Duration::from_millis(100);
/// Maximum number of errors read in that time; more stay in the driver, so that many errors cost little.
const MOST_TOGETHER: u64 = 1000;
/// The same error of a GPU is logged at most once in this time.
const LOG_EVERY: Duration = Duration::from_secs(60);

pub struct Events {
    generation: Arc<Generation>,
    context: Arc<Context>,
    caller: Caller,
    listening: Vec<Listen>,
    logged: HashMap<(usize, u64), Instant>,
}

impl Events {
    pub fn new(generation: Arc<Generation>, context: Arc<Context>) -> Self {
        let caller = context.health.driver.caller(Condition::XidEvents, None);
        Self { generation, context, caller, listening: Vec::new(), logged: HashMap::new() }
    }

    pub fn run(mut self) {
        // Closed: the core has ended, and with it the agent.
        let _closed = self.serve();
    }

    fn is_over(&self) -> bool {
        self.context.stopping() || self.generation.is_dead()
    }

    fn serve(&mut self) -> Result<(), Closed> {
        let generation = Arc::clone(&self.generation);
        let Ok(xids) = Xids::new(&generation) else {
            tracing::info!("this driver does not support XID error events");
            return Ok(());
        };
        while !self.is_over() {
            self.listen(&xids);
            let mut seen: BTreeMap<(usize, u64), u64> = BTreeMap::new();
            if self.listening.is_empty() {
                std::thread::sleep(TOGETHER);
                continue;
            }
            match self.collect(&xids, &mut seen) {
                Err(error) if fault(&error) == Some(DeviceFault::Dead) => self.generation.kill(),
                // One lost GPU must not cause a busy loop.
                Err(_) => std::thread::sleep(WAIT),
                Ok(()) => {}
            }
            for ((gpu, xid), count) in seen {
                self.log(gpu, xid, count);
                self.context.to.observe(Observation::Xid { gpu, xid, count })?;
            }
        }
        Ok(())
    }

    /// Registers the devices that were opened since the last call.
    fn listen(&mut self, xids: &Xids<'_>) {
        let new = std::mem::take(&mut *self.generation.listen.lock().unwrap_or_else(PoisonError::into_inner));
        for device in new {
            let begun = Instant::now();
            let result = self.caller.during(Call::RegisterEvents, boot_now(), || xids.listen(device.device));
            let took = begun.elapsed();
            let calls = self.context.health.driver.device(&device.uuid);
            calls.record(Call::RegisterEvents, took, None);
            calls.set_supported(Call::RegisterEvents, result.is_ok());
            if let Err(error) = result {
                if !is_unsupported(&error) {
                    tracing::info!(uuid = &*device.uuid, %error, "cannot receive XID errors of this GPU");
                }
                continue;
            }
            self.listening.retain(|known| known.slot != device.slot);
            self.listening.push(device);
        }
    }

    fn wait(&self, xids: &Xids<'_>, at_most: Duration) -> Result<Option<(usize, u64)>, NvmlError> {
        let timeout_ms = u32::try_from(at_most.as_millis()).unwrap_or(u32::MAX);
        let event = self.caller.during(Call::EventSetWait, boot_now(), || xids.wait(timeout_ms))?;
        let Some((device, xid)) = event else { return Ok(None) };
        Ok(self.listening.iter().find(|known| known.device == device).map(|known| (known.slot, xid)))
    }

    /// Waits for one error, then reads those that follow shortly after it.
    fn collect(&self, xids: &Xids<'_>, seen: &mut BTreeMap<(usize, u64), u64>) -> Result<(), NvmlError> {
        let Some(first) = self.wait(xids, WAIT)? else { return Ok(()) };
        seen.insert(first, 1);
        let begun = Instant::now();
        for _ in 0..MOST_TOGETHER {
            let left = TOGETHER.saturating_sub(begun.elapsed());
            if left < Duration::from_millis(1) {
                break;
            }
            if let Some(event) = self.wait(xids, left)? {
                *seen.entry(event).or_default() += 1;
            }
        }
        std::thread::sleep(TOGETHER.saturating_sub(begun.elapsed()));
        Ok(())
    }

    fn log(&mut self, gpu: usize, xid: u64, count: u64) {
        self.logged.retain(|_, at| at.elapsed() < LOG_EVERY);
        if self.logged.contains_key(&(gpu, xid)) {
            return;
        }
        self.logged.insert((gpu, xid), Instant::now());
        let uuid = self.listening.iter().find(|known| known.slot == gpu).map_or("", |known| &*known.uuid);
        tracing::warn!(
            uuid,
            xid,
            count,
            "the driver reports an XID error; see dmesg for details; the same error is not logged again for a minute"
        );
    }
}
