// What plays a film of nbs/research/attention_view.ipynb: pictures, lit as the sound goes along.
(film) => {
  const sound = film.querySelector("audio");
  const seconds = JSON.parse(film.dataset.seconds);
  const maps = [...film.querySelectorAll("canvas")].map((canvas) => ({
    pen: canvas.getContext("2d"),
    heat: Uint8Array.from(atob(canvas.dataset.heat), (byte) => byte.charCodeAt(0)),
    width: canvas.width,
    height: canvas.height,
  }));

  function draw() {
    const last = seconds.length - 1;
    const now = Math.round((sound.currentTime / (seconds[last] || 1)) * last);
    const token = Math.max(0, Math.min(last, now));
    for (const { pen, heat, width, height } of maps) {
      const frame = pen.createImageData(width, height), size = width * height;
      for (let i = 0; i < size; i++) frame.data[4 * i + 3] = 0.8 * (255 - heat[token * size + i]);
      pen.putImageData(frame, 0, 0);
    }
    film.dataset.token = token;
    if (!sound.paused) requestAnimationFrame(draw);
  }

  sound.onplay = sound.ontimeupdate = sound.onseeked = draw;
  draw();
}
