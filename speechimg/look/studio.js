// The page's half of nbs/15_studio.ipynb: a button, a meter, a clock; the pictures as buttons.
const RATE = 16000; // numbers a second, as the model expects them
const LARGEST = 8e6; // bytes: a message of more than 10 MB would cut the connection to the kernel
const FORBIDDEN =
  "This page may not use a microphone: it has to come from https or from localhost. Choose a file.";
const ADVICE = (most) => `convert it to WAV, FLAC or MP3 and cut it to ${most} seconds`;
const REFUSED = {
  NotAllowedError:
    "The browser may not use the microphone. Allow it beside the address, or choose a file.",
  NotFoundError: "No microphone was found. Plug one in, or choose a file.",
  NotReadableError: "Another program holds the microphone. Close it, or choose a file.",
};

function make(tag, name, text) {
  const one = document.createElement(tag);
  if (name) one.className = "speechimg-" + name;
  if (text) one.textContent = text; // never as HTML: captions and file names are other people's text
  return one;
}

function player(src) {
  const one = make("audio");
  one.controls = true;
  one.src = src;
  return one;
}

// ---- sound

async function convert(sound, seconds) {
  // AudioBuffer -> 16-bit numbers, one channel, 16 kHz
  const length = Math.max(1, Math.ceil(Math.min(sound.duration, seconds) * RATE));
  const context = new OfflineAudioContext(1, length, RATE);
  const source = context.createBufferSource();
  source.buffer = sound;
  source.connect(context.destination);
  source.start();
  const wave = (await context.startRendering()).getChannelData(0);
  return Int16Array.from(wave, (x) => Math.round(32767 * Math.max(-1, Math.min(1, x))));
}

const TAP = `registerProcessor("tap", class extends AudioWorkletProcessor {
  process(inputs) {
    if (inputs[0][0]) this.port.postMessage(inputs[0][0].slice());
    return true;
  }
});`;

async function makeTap(context, push) {
  // a node that hands every piece of sound to push
  try {
    const code = new Blob([TAP], { type: "text/javascript" });
    await context.audioWorklet.addModule(URL.createObjectURL(code));
    const tap = new AudioWorkletNode(context, "tap");
    tap.port.onmessage = (event) => push(event.data);
    return tap;
  } catch {
    // pages that forbid such modules: the older way
    const tap = context.createScriptProcessor(4096, 1, 1);
    tap.onaudioprocess = (event) => push(event.inputBuffer.getChannelData(0).slice());
    return tap;
  }
}

async function listen(push) {
  // opens the microphone; push gets every piece of sound
  if (!navigator.mediaDevices) throw new Error(FORBIDDEN);
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const context = new AudioContext();
  const tap = await makeTap(context, push);
  context.createMediaStreamSource(stream).connect(tap);
  tap.connect(context.destination);
  return {
    rate: context.sampleRate,
    close() {
      stream.getTracks().forEach((track) => track.stop());
      context.close();
    },
  };
}

function joined(pieces, rate) {
  // Float32Arrays -> one AudioBuffer
  const length = pieces.reduce((sum, piece) => sum + piece.length, 0);
  const sound = new AudioBuffer({ length: Math.max(length, 1), sampleRate: rate });
  let at = 0;
  for (const piece of pieces) {
    sound.copyToChannel(piece, 0, at);
    at += piece.length;
  }
  return sound;
}

// ---- the row of controls

function recorder(most, say, send) {
  // button, meter and clock; stops by itself after `most` seconds
  const button = make("button", "record", "● record");
  const level = make("meter", "level");
  const clock = make("span", "elapsed");
  level.max = 1;
  let microphone = null, pieces = [], count = 0;

  function time() {
    const seconds = microphone ? count / microphone.rate : 0;
    clock.textContent = `${seconds.toFixed(1)} s of ${most} s`;
  }

  function push(piece) {
    if (!microphone) return;
    pieces.push(piece);
    count += piece.length;
    const power = piece.reduce((sum, x) => sum + x * x, 0) / piece.length;
    level.value = Math.min(1, 3 * Math.sqrt(power));
    time();
    if (count / microphone.rate >= most) stop();
  }

  async function start() {
    pieces = [];
    count = 0;
    button.disabled = true;
    try {
      microphone = await listen(push);
      button.textContent = "■ stop";
      button.classList.add("speechimg-on");
      say("Say what you are looking for.");
    } catch (error) {
      say(REFUSED[error.name] ?? error.message);
    }
    button.disabled = false;
  }

  async function stop() {
    const sound = joined(pieces, microphone.rate);
    close();
    button.textContent = "● record";
    button.classList.remove("speechimg-on");
    level.value = 0;
    if (count) send({ kind: "recording" }, await convert(sound, most));
    else say("Nothing was recorded. Try again.");
  }

  function close() {
    if (microphone) microphone.close();
    microphone = null;
  }

  button.onclick = () => (microphone ? stop() : start());
  time();
  return { parts: [button, level, clock], close };
}

function chooser(most, say, send) {
  // a file of up to 8 MB goes as it is; of a larger one, and of one that Python cannot read (WebM and
  // M4A, as browsers and phones record), the page sends the sound of the beginning
  const file = make("input", "file");
  let data = null, name = "";
  file.type = "file";
  file.accept = "audio/*,video/webm,.wav,.flac,.ogg,.mp3,.m4a,.webm";
  file.onchange = async () => {
    const chosen = file.files[0];
    if (!chosen) return;
    data = await chosen.arrayBuffer();
    name = chosen.name;
    file.value = "";
    if (data.byteLength <= LARGEST) send({ kind: "file", name }, data.slice(0));
    else await decode(() => `${name}: the browser cannot read this file; ` + ADVICE(most));
  };

  async function decode(otherwise) {
    if (!data) return;
    try {
      const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(data);
      send({ kind: "recording" }, await convert(sound, most + 1));
    } catch {
      say(otherwise());
    }
    data = null;
  }

  return { file, decode };
}

// ---- the answer

function card(hit, model) {
  const one = make("button", "hit");
  const picture = make("img");
  picture.src = hit.src;
  picture.alt = hit.name;
  const moved = hit.coarse > hit.fine ? "up" : "down";
  one.append(picture, make("span", moved, `coarse ${hit.coarse} → fine ${hit.fine}`));
  one.dataset.picture = hit.picture;
  one.title = "hear its captions";
  one.onclick = () => model.send({ kind: "hear", picture: hit.picture });
  return one;
}

function row(stage, title, model) {
  // the five best of a stage
  const best = model.get("hits").filter((hit) => hit[stage] <= 5);
  best.sort((a, b) => a[stage] - b[stage]);
  const cards = make("div", "cards");
  cards.append(...best.map((hit) => card(hit, model)));
  const section = make("section", stage);
  section.append(make("h4", "", title), cards);
  return section;
}

function line({ text, src }) {
  const one = make("div", "sound");
  one.append(player(src), make("span", "", text));
  return one;
}

function render({ model, el }) {
  const most = model.get("max_seconds");
  const bar = make("div", "bar"), message = make("p", "message");
  const heard = make("div", "heard"), ranks = make("div", "ranks"), clips = make("div", "clips");
  const say = (text) => {
    message.textContent = text;
  };
  const send = (content, data) => {
    say("searching ...");
    model.send(content, undefined, [data.buffer ?? data]);
  };
  const microphone = recorder(most, say, send);
  message.setAttribute("role", "status");
  const files = chooser(most, say, send);
  bar.append(...microphone.parts, files.file);
  el.classList.add("speechimg-studio");
  el.append(bar, message, heard, ranks, clips);

  function draw() {
    const src = model.get("heard"), found = model.get("hits").length;
    say(model.get("message"));
    heard.replaceChildren(...(src ? [player(src)] : []));
    ranks.replaceChildren();
    if (found) ranks.append(row("coarse", "coarse: one vector each", model));
    if (found) ranks.append(row("fine", "fine: read together", model));
  }

  function hear() {
    const { title, sounds } = model.get("clips");
    clips.replaceChildren(...(title ? [make("h4", "", title)] : []), ...(sounds ?? []).map(line));
    clips.querySelector("audio")?.play().catch(() => {});
  }

  const refused = () => files.decode(() => model.get("message"));
  model.on("change:number", draw);
  model.on("change:clips", hear);
  model.on("change:refused", refused);
  draw();
  return () => {
    microphone.close();
    model.off("change:number", draw);
    model.off("change:clips", hear);
    model.off("change:refused", refused);
  };
}

export default { render };
